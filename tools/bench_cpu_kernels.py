"""The CPU kernels by themselves: bytes of weights per second, next to the rate at which this process reads memory.

    python -m tools.bench_cpu_kernels --json benchmarks/cpu-kernels.json

Each round measures every product once, between two readings of memory, so that ratios share their conditions. The weights
are as wide as Step3's and larger than any cache: an [18432, 7168] matrix in each form, and a MoE layer with only eight of
its 48 experts, of which three and the shared one are read for each token.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from step3_jax.bench.machine import conditions, cpu_pressure
from step3_jax.bench.report import format_report, write_sections
from step3_jax.bench.yardstick import read_meter
from step3_jax.cpu_count import count_cpus
from step3_jax.cpu_kernels import api
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.quant import Form, quantise

FORMS = ("float32", "bfloat16", "fp8", "int8", "int4")
OUTPUTS, HIDDEN, WIDTH, EXPERTS, TOP_K = 18432, 7168, 5120, 8, 3
Row = dict[str, str | int | float]
# A case: what its row says of it, bytes of weights that it reads, operations, and the call.
Case = tuple[Row, int, int, Callable[[], object]]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,64", help="rows of activations (default: %(default)s)")
    parser.add_argument("--forms", default=",".join(FORMS), help="default: %(default)s")
    parser.add_argument(
        "--activations",
        default="float32,bfloat16",
        help="what they are rounded to, where the processor can and the form allows it (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--outputs", type=int, default=OUTPUTS, help="rows of the matrix (default: %(default)s)")
    parser.add_argument("--no-layer", action="store_true", help="leave out the MoE layer")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    kernels = find_kernels()
    if not isinstance(kernels, Kernels):
        raise SystemExit(f"no CPU kernels: {kernels.reason}")
    rows = [int(word) for word in arguments.rows.split(",")]
    forms = arguments.forms.split(",")
    variants = list(dict.fromkeys(map(kernels.for_activations, arguments.activations.split(","))))
    cases = list_products(variants, forms, rows, arguments.outputs)
    if not arguments.no_layer:
        cases += list_layers(variants, [form for form in forms if form != "float32"])
    before = cpu_pressure()
    read_rate, found = measure(cases, arguments.rounds)
    result = {
        "conditions": conditions()
        | {
            "instruction_set": kernels.instruction_set,
            "rounds": arguments.rounds,
            "cpu_pressure_before": before,
            "cpu_pressure_after": cpu_pressure(),
        },
        "read_gb_per_s": read_rate / 1e9,
        "kernels": found,
    }
    print(format_report(result))
    if arguments.json:
        write_sections(arguments.json, result)


def list_products(variants: Sequence[Kernels], forms: Sequence[str], rows: Sequence[int], outputs: int) -> list[Case]:
    """One matrix in each form with some rows of activations, and XLA's float32 product for comparison."""
    cases: list[Case] = []
    weight = _normal(0, outputs, HIDDEN)
    for form in forms:
        held = weight.astype(form) if form in ("float32", "bfloat16") else quantise(weight, cast(Form, form))
        for count, kernels in itertools.product(rows, _for_form(variants, form)):
            product = jax.jit(functools.partial(_multiply, kernels))
            call = functools.partial(product, _normal(1, count, HIDDEN), held)
            row: Row = {"what": "product", "form": form, "activations": kernels.activations, "rows": count}
            cases.append((row, _num_bytes(held), 2 * count * weight.size, call))
    if "float32" in forms:
        plain = jax.jit(lambda x, weight: x @ weight.T)
        for count in rows:
            call = functools.partial(plain, _normal(1, count, HIDDEN), weight)
            row = {"what": "product", "form": "float32, XLA", "activations": "float32", "rows": count}
            cases.append((row, weight.nbytes, 2 * count * weight.size, call))
    return cases


def list_layers(variants: Sequence[Kernels], forms: Sequence[str]) -> list[Case]:
    """A MoE layer for one token: three experts and the shared one, in one call."""
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    cases: list[Case] = []
    for form in forms:
        one = [_normal(seed, *shape) for seed, shape in enumerate(shapes)]
        held = [array.astype(form) if form == "bfloat16" else quantise(array, cast(Form, form)) for array in one]
        stacks = jax.tree.map(lambda leaf: jnp.stack([leaf] * EXPERTS), held)
        chosen = jnp.asarray([[1, 4, 6]], jnp.int32)
        num_bytes = (TOP_K + 1) * sum(map(_num_bytes, held))
        for kernels in _for_form(variants, form):
            layer = jax.jit(functools.partial(api.experts, kernels))
            call = functools.partial(layer, _normal(9, 1, HIDDEN), jnp.ones((1, TOP_K)) / TOP_K, chosen, stacks, held)
            row: Row = {"what": "MoE layer", "form": form, "activations": kernels.activations, "rows": 1}
            cases.append((row, num_bytes, 8 * sum(array.size for array in one), call))
    return cases


def measure(cases: Sequence[Case], rounds: int) -> tuple[float, list[Row]]:
    """The rate at which memory is read, and a row for each case; medians over rounds."""
    read = read_meter(count_cpus())
    rates: list[float] = []
    seconds: list[list[float]] = [[] for _ in cases]
    for _, _, _, call in cases:
        jax.block_until_ready(call())
    for _ in range(rounds):
        for (_, _, _, call), times in zip(cases, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
        rates.append(read())
    rate = statistics.median(rates)
    found = []
    for (row, num_bytes, operations, _), times in zip(cases, seconds, strict=True):
        median = statistics.median(times)
        found.append(
            row
            | {
                "ms": median * 1e3,
                "gb_per_s": num_bytes / median / 1e9,
                "share_of_read": num_bytes / median / rate,
                "gflop_per_s": operations / median / 1e9,
            }
        )
    return rate, found


def _multiply(kernels: Kernels, x: Float[Array, "N K"], weight: api.Stored) -> Float[Array, "N O"]:
    return api.products(kernels, x, [weight])[0]


def _for_form(variants: Sequence[Kernels], form: str) -> list[Kernels]:
    """Those that differ for weights of a form: others than bfloat16 and FP8 meet float32 in any case."""
    return [one for one in variants if one.activations == "float32" or form in ("bfloat16", "fp8")]


def _normal(seed: int, *shape: int) -> Float[Array, "rows columns"]:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _num_bytes(weight: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))


if __name__ == "__main__":
    main()
