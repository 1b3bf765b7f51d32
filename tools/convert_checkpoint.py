"""Converts a checkpoint: another name for `step3 convert`.

python tools/convert_checkpoint.py SRC DST [--to orbax|hf] [--dtype bf16|fp8|float32] [--resume] [--verify] ...
"""

from __future__ import annotations

import sys

from step3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
