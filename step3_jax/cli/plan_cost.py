"""`step3 plan cost`: what a million tokens cost on each kind of hardware.

Exit code 0, or 2 for a usage error.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

from step3_jax.layout.hardware import Hardware, list_hardware, load_hardware
from step3_jax.planner.cost import Prices
from step3_jax.planner.cost_table import to_dict, to_lines
from step3_jax.planner.estimate import estimate_cost
from step3_jax.planner.own_measurement import OwnMeasurement, read_measurement
from step3_jax.planner.quantity import parse_assignment, parse_tokens
from step3_jax.planner.shape import load_shape


def run(arguments: argparse.Namespace) -> int:
    """Prints the estimate."""
    shape = load_shape(arguments.model)
    context_tokens = parse_tokens(arguments.context)
    prices = read_prices(arguments.price)
    attention, ffn = (
        None if name is None else load_hardware(name) for name in (arguments.attention_hardware, arguments.ffn_hardware)
    )
    answer = estimate_cost(
        shape,
        context_tokens=context_tokens,
        kv_dtype=arguments.kv_dtype,
        candidates=read_candidates(arguments.hardware, prices),
        attention=attention,
        ffn=ffn,
        prices=prices,
        measurements=read_measurements(arguments.measured, context_tokens),
    )
    print(json.dumps(to_dict(answer)) if arguments.json else "\n".join(to_lines(answer)))
    return 0


def read_prices(words: Sequence[str]) -> Prices:
    """Prices from `--price NAME=USD`.

    Raises:
      ValueError: If one does not have that form, names unknown hardware, or is not above 0.
    """
    given = {}
    for word in words:
        name, usd = parse_assignment(word, "--price", "2.5")
        try:
            value = float(usd)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"--price {word}: USD per hour of one device, a number above 0, is needed")
        given[load_hardware(name).name] = value
    return Prices(given)


def read_candidates(words: Sequence[str], prices: Prices) -> list[Hardware]:
    """Hardware from `--hardware`; without it, all hardware that has a price.

    Raises:
      ValueError: If a name is unknown.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    found = [load_hardware(name) for name in names or list_hardware()]
    return found if names else [one for one in found if prices.usd_per_hour(one) is not None]


def read_measurements(words: Sequence[str], context_tokens: int) -> list[OwnMeasurement]:
    """The user's own files from `--measured [NAME=]FILE`.

    Raises:
      ValueError: If a file cannot be used, or the hardware is unknown.
    """
    found = []
    for word in words:
        name, sign, path = word.partition("=")
        is_named = bool(sign) and not pathlib.Path(word).exists()
        found.append(
            read_measurement(path if is_named else word, name if is_named else None, context_tokens=context_tokens)
        )
    return found
