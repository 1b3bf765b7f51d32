"""`python -m step3_jax`: the same as the command `step3`."""

from __future__ import annotations

import sys

from step3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
