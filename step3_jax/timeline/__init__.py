"""Timelines of a pipeline's work, recorded or simulated: as a trace file and as a picture; no jax."""
