"""Step3 in JAX: the model, its checkpoints, and a decode loop for text and pictures."""

__version__ = "0.1.0"
