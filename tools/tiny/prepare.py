"""One command for all data of the tiny Step3: fetches the packages, paints the pictures, writes the texts.

Every step skips what is there already, so an interrupted run can simply be restarted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.tiny.fetch import DEFAULT_DATA, say

STEPS = ("fetch", "drawings", "pictures", "picture_baselines", "text_corpus", "text_baselines")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data folder (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        action="store_true",
        help="also retrain the tokenizer, which makes weights trained with the old one useless",
    )
    options = parser.parse_args()
    for step in (*STEPS, "tokenizer") if options.tokenizer else STEPS:
        say(f"== {step}")
        command = [sys.executable, "-m", f"tools.tiny.{step}", "--data", str(options.data)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise SystemExit(f"{step} failed; fix what it reports above and run this again: finished steps are skipped")


if __name__ == "__main__":
    main()
