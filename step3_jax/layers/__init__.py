"""The parts of a layer: norm, rope, linear, attention, router, experts."""
