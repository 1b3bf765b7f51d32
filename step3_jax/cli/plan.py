"""`step3 plan`: finds the kind of plan, and imports nothing for the others."""

from __future__ import annotations

import argparse
import importlib


def run(arguments: argparse.Namespace) -> int:
    """Runs the module `cli/plan_<what>.py`."""
    return int(importlib.import_module(f"step3_jax.cli.plan_{arguments.what}").run(arguments))
