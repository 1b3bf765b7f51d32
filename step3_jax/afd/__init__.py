"""Attention and FFN on disjoint devices: topology, payload, roles, and the executors that join them."""
