"""Executor `host`: one process that drives both sides."""
