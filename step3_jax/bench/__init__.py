"""How fast the engine is, and what it costs beside the calls that it makes."""
