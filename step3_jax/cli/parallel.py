"""Options of a model that is spread over several devices."""

from __future__ import annotations

import argparse

from step3_jax.mesh import force_cpu_devices
from step3_jax.sharding import AttentionForm, Parallel

EXCHANGES = ("auto", "gather", "all_to_all")


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Adds how many devices the model is spread over, and how."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--data-parallel-size", "--dp", dest="dp", type=int, metavar="N", help="groups of devices (default: 1)"
    )
    group.add_argument(
        "--tensor-parallel-size",
        "--tp",
        dest="tp",
        type=int,
        metavar="N",
        help="devices of a group: they share out dense weights, and each has sequences of its own (default: 1)",
    )
    group.add_argument(
        "--expert-parallel-size",
        "--ep",
        dest="ep",
        type=int,
        metavar="N",
        help="groups that the routed experts are shared out over (default: the most that the model allows)",
    )
    group.add_argument(
        "--tensor-parallel-attention",
        action="store_true",
        help="share out the query heads instead of the sequences; each device of a group then holds the same KV cache",
    )
    group.add_argument(
        "--expert-exchange",
        choices=EXCHANGES,
        default="auto",
        help="how tokens come to their experts (default: all_to_all between hosts, else gather)",
    )


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
