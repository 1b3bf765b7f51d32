"""Converts a checkpoint: `step3 convert` by another name.

python tools/convert_checkpoint.py SRC DST [--to orbax|hf] [--dtype bf16|fp8|float32] [--resume] [--verify] ...
"""

from __future__ import annotations

import sys

from step3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
