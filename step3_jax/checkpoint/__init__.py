"""Reading and writing checkpoints in the released format."""
