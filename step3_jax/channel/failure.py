"""The error of a run that cannot continue."""

from __future__ import annotations


class RunLostError(RuntimeError):
    """A rank of the run has failed or is lost, so that no more calls can be made. The message says which and why."""
