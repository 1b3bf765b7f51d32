"""Simulates a deployment with attention and FFN on separate devices, event by event: the pipeline, and its requests."""
