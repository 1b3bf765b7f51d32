"""The options of each command. Nothing here imports jax, so that `--help` is immediate."""
