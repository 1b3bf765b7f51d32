"""Products from weights as they are stored, for CPUs: C, called by compiled programs."""
