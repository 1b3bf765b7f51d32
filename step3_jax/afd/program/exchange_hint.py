"""What XLA is told about the exchanges on GPUs, so that it starts them before a tick's work and waits after it."""

from __future__ import annotations

from step3_jax.gpu import compiler_options
from step3_jax.resources import find

# A shipped file, not one written for each run: its path is part of the compile cache's key.
_HINTS = "configs/gpu/exchange_latency.pbtxt"


def exchange_options(platform: str) -> dict[str, str] | None:
    """Options for `jax.jit` of a program with exchanges; empty except on GPUs.

    XLA orders a program's launches by how long it believes each to take. An exchange takes as long as the other side
    needs to compute what it sends, which XLA cannot know; the file says that an exchange takes longer than anything
    else. The disabled check would warn of names that are in the file and not in the program, and the other way round.

    Args:
      platform: As `Device.platform` names it.
    """
    options = compiler_options(platform)
    if options is None:
        return None
    return options | {
        "xla_gpu_pgle_profile_file_or_directory_path": str(find(_HINTS)),
        "xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF",
    }
