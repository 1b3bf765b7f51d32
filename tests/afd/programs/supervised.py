"""A rank with its supervisor, whose worker is `stand_in.py` and not the command."""

from __future__ import annotations

import sys

from step3_jax.cli.supervise import supervise_rank

if __name__ == "__main__":
    sys.exit(supervise_rank(sys.argv[1:], module="stand_in"))
