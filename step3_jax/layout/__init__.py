"""A deployment, and what it holds, moves and computes, as plain numbers: no jax, and no device."""
