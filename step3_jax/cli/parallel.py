"""Options of a model that is spread over several devices."""

from __future__ import annotations

import argparse

from step3_jax.mesh import force_cpu_devices
from step3_jax.sharding import AttentionForm, Parallel


def read_parallel(arguments: argparse.Namespace) -> Parallel | None:
    """The setting that was asked for, None for one device; a single CPU is made to look like as many devices.

    Raises:
      ValueError: For numbers that cannot be, or options that need several devices without them.
    """
    sizes = {name: getattr(arguments, name) for name in ("dp", "tp", "ep") if getattr(arguments, name) is not None}
    if not sizes:
        if arguments.tensor_parallel_attention or arguments.expert_exchange != "auto":
            raise ValueError(
                "--tensor-parallel-attention and --expert-exchange are for several devices: add --dp or --tp"
            )
        return None
    if "ep" in sizes and not sizes.keys() & {"dp", "tp"}:
        # As vLLM has it: the experts are spread over the devices there are, and nothing else is said of them.
        sizes["dp"] = sizes["ep"]
    attention: AttentionForm = "tensor" if arguments.tensor_parallel_attention else "data"
    parallel = Parallel(**sizes, attention=attention, exchange=arguments.expert_exchange)
    force_cpu_devices(parallel.num_devices)
    return parallel
