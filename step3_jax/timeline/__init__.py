"""Who computed which micro-batch of which layer when: recorded or simulated, as a trace file and as a picture; no jax."""
