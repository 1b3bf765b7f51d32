"""Executor `program`: a process for each device."""
