"""The error of a run that cannot go on."""

from __future__ import annotations


class RunLostError(RuntimeError):
    """A rank of the run has failed or is gone, so that no call can be made any more. The message says which and why."""
