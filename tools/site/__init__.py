"""The documentation site: what of it is generated from the code. `make docs` builds it."""
