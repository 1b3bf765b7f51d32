"""Starts a command as many processes: another name for `step3 launch`.

python tools/launch_multihost.py --hosts a,b,c -- generate ...
python tools/launch_multihost.py --local 2 -- generate --afd 1a1f -p ...
"""

from __future__ import annotations

import sys

from step3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
