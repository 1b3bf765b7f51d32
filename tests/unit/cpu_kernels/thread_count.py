"""Prints how many threads XLA's pool has, and a digest of what each operation gives: run by `test_threads.py`."""

from __future__ import annotations

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import CachedTokens, KVPages
from step3_jax.cpu_kernels import api
from step3_jax.cpu_kernels.loader import Kernels, Unavailable, find_kernels
from step3_jax.quant import FP8, GROUP, BlockScaled, PackedInt4

FORMS = ("float32", "bfloat16", "fp8", "int8", "int4")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make(form: str, *shape: int) -> api.Stored:
    """A weight of any numbers."""
    *lead, rows, columns = shape
    groups = -(-columns // GROUP)
    if form in ("float32", "bfloat16"):
        return normal(*shape).astype(form)
    if form == "int4":
        values = RNG.integers(0, 256, (*lead, rows, -(-columns // 32) * 16), np.uint8)
        return PackedInt4(jnp.asarray(values), normal(*lead, rows, groups), columns)
    if form == "int8":
        values = RNG.integers(-127, 128, shape, np.int8)
        return BlockScaled(jnp.asarray(values), normal(*lead, rows, groups), (1, GROUP))
    # Up to the largest positive number; NaN is one more.
    values = RNG.integers(0, 0x7F, shape, np.uint8).view(jnp.dtype(FP8))
    return BlockScaled(jnp.asarray(values), normal(*lead, -(-rows // GROUP), groups), (GROUP, GROUP))


def run(kernels: Kernels, weights: dict[str, list[api.Stored]]) -> dict[str, str]:
    """Enough of each operation that threads share it, with few rows and with many."""
    x, wide, factors = normal(70, 500), normal(70, 900), jnp.abs(normal(70, 2))
    chosen = jnp.asarray(np.stack([RNG.permutation(6)[:2] for _ in range(70)]), jnp.int32)
    found = {}
    for rows in (1, 5, 70):
        outputs = api.products(kernels, wide[:rows], [own[-1] for own in weights.values()])
        found |= {f"products {rows} {index}": out for index, out in enumerate(outputs)}
        for form, (*stacks, gate, up, down) in weights.items():
            given = x[:rows], factors[:rows], chosen[:rows], stacks, (gate, up, down)
            found[f"swiglu {rows} {form}"] = api.swiglu(kernels, x[:rows], gate, up, down)
            found[f"experts {rows} {form}"] = api.experts(kernels, *given)
        table = jnp.asarray(RNG.permutation(rows * 5).reshape(rows, 5), jnp.int32)
        pages = KVPages(normal(rows * 5, 64, 32), normal(rows * 5, 64, 32))
        cached = CachedTokens(pages, table, jnp.asarray(RNG.integers(250, 320, rows), jnp.int32))
        found[f"attend {rows}"] = api.attend(kernels, normal(rows, 1, 20, 32), cached)
    return {name: hashlib.sha256(np.asarray(out).tobytes()).hexdigest() for name, out in found.items()}


def main() -> None:
    kernels = find_kernels()
    if isinstance(kernels, Unavailable):
        print(json.dumps({"reason": kernels.reason}))
        return
    shapes = (5, 300, 500), (5, 300, 500), (5, 500, 300), (900, 500), (900, 500), (500, 900)
    weights = {form: [make(form, *shape) for shape in shapes] for form in FORMS}
    # The same one twice where the processor has no products of bfloat16.
    digests = [run(one, weights) for one in (kernels, kernels.for_activations(jnp.bfloat16))]
    names = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    print(json.dumps({"threads": sum("XLAEigen" in name for name in names), "digests": digests}))


if __name__ == "__main__":
    main()
