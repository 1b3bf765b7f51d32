"""A rank that runs the Python of its last word."""

from __future__ import annotations

import sys

exec(sys.argv[-1])
