"""A deployment with attention and FFN apart, simulated event by event: the pipeline, and the requests that it serves."""
