"""`step3 plan`: finds what is to be planned, and imports nothing for the rest."""

from __future__ import annotations

import argparse
import importlib


def run(arguments: argparse.Namespace) -> int:
    """Runs the module of its name, `cli/plan_<what>.py`."""
    return int(importlib.import_module(f"step3_jax.cli.plan_{arguments.what}").run(arguments))
