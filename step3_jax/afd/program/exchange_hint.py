"""What XLA is told of the exchanges on GPUs, so that it starts them before a tick's work and waits for them after it."""

from __future__ import annotations

from step3_jax.gpu import compiler_options
from step3_jax.resources import find

# A file that ships, not one written for each run: its path is part of the key of the compile cache.
_HINTS = "configs/gpu/exchange_latency.pbtxt"


def exchange_options(platform: str) -> dict[str, str] | None:
    """Options for `jax.jit` of a program with exchanges; none but on GPUs.

    XLA orders a program's launches by how long it believes each to take. An exchange takes as long as the other side
    needs to compute what it sends, which XLA cannot know; the file says that an exchange takes longer than anything else.
    The check that is off would warn of names in the file that a program lacks, and of others that it has.

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
