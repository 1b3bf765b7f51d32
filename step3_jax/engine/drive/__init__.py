"""Several processes driven from one: rank 0 has the engine, and sends its calls to the workers of the other ranks."""
