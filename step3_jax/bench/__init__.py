"""How fast the engine is, and its overhead over the calls that it makes."""
