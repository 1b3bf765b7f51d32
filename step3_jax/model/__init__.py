"""The model: decoder, vision tower, and the two together."""
