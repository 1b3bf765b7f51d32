"""The channel between rank 0 of a run and its other ranks: messages of plain data over ZeroMQ."""
