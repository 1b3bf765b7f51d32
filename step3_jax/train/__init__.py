"""Training: loss, data, step, loop."""
