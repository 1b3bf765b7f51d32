"""Scripts for developers: training data of the tiny model, benchmarks, checks."""
