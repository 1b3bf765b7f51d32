"""Options of attention and FFN on separate devices."""

from __future__ import annotations

import argparse

from step3_jax.layout.deployment import DEFAULT_DEADLINE_S, DEFAULT_MICROBATCHES, FFN_DEVICES
from step3_jax.layout.payload import PAYLOADS

EXECUTORS = ("auto", "host", "program")


def add_afd(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds the options for attention and FFN on separate devices.

    Args:
      parser: Gets the options.
      default: The default of `--afd`.
    """
    group = parser.add_argument_group("attention and FFN on separate devices (docs/afd.md)")
    group.add_argument(
        "--afd",
        default=default,
        metavar="xAyF",
        help="x attention and y FFN instances, such as 1a1f or 2a2f, or a deployment file (.yaml)"
        + (f" (default: {default})" if default else "; CPUs emulate as many devices"),
    )
    group.add_argument("--afd-devices", type=int, metavar="N", help="devices of an instance (default: 1)")
    group.add_argument(
        "--afd-ffn-device",
        choices=FFN_DEVICES,
        help="cpu: dense layers and experts are in this machine's memory and computed there, in one process (default: same, "
        "the kind of device that attention is on)",
    )
    group.add_argument(
        "--afd-microbatches",
        type=int,
        metavar="N",
        help=f"micro-batches in flight, 1 to 4 (default: {DEFAULT_MICROBATCHES})",
    )
    group.add_argument(
        "--afd-payload",
        choices=PAYLOADS,
        help="format of what attention sends to the FFN side (default: auto, float32 for float32 models, otherwise fp8)",
    )
    group.add_argument(
        "--afd-executor",
        choices=EXECUTORS,
        default="auto",
        help="host: all devices in this process; program: a process for each device, under step3 launch (default: auto, "
        "program where there are several processes)",
    )
    group.add_argument(
        "--afd-deadline",
        type=float,
        default=DEFAULT_DEADLINE_S,
        metavar="S",
        help="executor host: longest time that one stage may take (default: %(default)g)",
    )
