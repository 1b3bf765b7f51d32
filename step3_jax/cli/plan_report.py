"""`step3 plan report`: the Step-3 report's tables and figures, recomputed and compared with the printed ones.

Exit code 0 if every cell agrees, except those known to differ, else 1.
"""

from __future__ import annotations

import argparse
import json

from step3_jax.planner.report_table import is_reproduced, to_dict, to_lines
from step3_jax.planner.reproduction import compare_report, load_report


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison."""
    tables = compare_report(load_report())
    print(json.dumps(to_dict(tables)) if arguments.json else "\n".join(to_lines(tables, is_brief=arguments.brief)))
    return 0 if is_reproduced(tables) else 1
