"""What one case is: how its inputs are made, what runs on them, and what it must reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantise import ScalesLayout, scales_to_rows
from pallas_kernels.storage import BLOCK

# Arrays, or pytrees of them.
Inputs = tuple[object, ...]
Rate = Literal["bf16", "fp8"]

# Two reads of the L2 cache of an H100 (50 MB) or H200 (60 MB).
ROTATED_BYTES = 120_000_000
MAX_SETS = 6
# Of numbers that are rounded to e4m3: those between two of them may take the one or the other.
ROUNDED_TOLERANCE = 3e-2


def keep(*inputs: object) -> Inputs:
    """The inputs as they are."""
    return inputs


def as_it_is(output: object, _: Inputs) -> object:
    """The output itself."""
    return output


def dequantised(output: tuple[jax.Array, ...], _: Inputs, *, scales_layout: ScalesLayout = "rows") -> jax.Array:
    """What e4m3 rows with a scale for each 128 columns mean: the first two arrays of an output."""
    values, scales = output[:2]
    if scales_layout == "columns":
        scales = scales_to_rows(scales, values.shape[0])
    return values.astype(jnp.float32) * jnp.repeat(scales, BLOCK, axis=1)[:, : values.shape[1]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another way to do a case's work: `run` on what `prepare`, untimed, makes of the case's inputs."""

    run: Callable[..., object]
    prepare: Callable[..., Inputs] = keep


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
      name: Operation, then what varies: "mfa_decode/fp8/64x4096".
      kernel: Name in `pallas_kernels`; what --only and the tuning file go by.
      make: Inputs from a seed; fresh ones each time.
      run: Called with the inputs and `implementation=`.
      view: What of an output is compared, from the output and the inputs: without the places that may hold anything.
      tolerance: Largest error of a row against the reference, as a share of the row's norm; None: timed only.
      num_bytes, flops: The least that must be read and written, and the arithmetic; 0 where nothing is timed.
      rate: Which of the two tensor-core ceilings `flops` count against.
      goal: Share of the ceiling to reach (docs/kernels.md); None where there is none.
      exception: Why the goal is shown and not judged.
      peers: What else the machine offers for the same work.
      carry: Inputs of the next call from this one's and its output, where the kernel changes an input in place.
      tuned: Operations whose blocks the sweep may change here.
      allowed_s: Seconds of silence between two of its steps; the mode's if None.
    """

    name: str
    kernel: str
    make: Callable[[int], Inputs]
    run: Callable[..., object]
    view: Callable[[object, Inputs], object] = as_it_is
    tolerance: float | None = None
    num_bytes: int = 0
    flops: int = 0
    rate: Rate = "bf16"
    goal: float | None = None
    exception: str | None = None
    peers: Mapping[str, Peer] = dataclasses.field(default_factory=dict)
    carry: Callable[[Inputs, object], Inputs] | None = None
    tuned: tuple[str, ...] = ()
    allowed_s: float | None = None

    @property
    def is_timed(self) -> bool:
        return self.num_bytes > 0

    @property
    def num_sets(self) -> int:
        """Input sets to rotate among, so that the L2 cache does not hold what is read next."""
        return max(1, min(MAX_SETS, -(-ROTATED_BYTES // max(self.num_bytes, 1))))


def row_errors(actual: object, expected: object) -> np.ndarray:
    """Largest error of each leading row over all arrays of two pytrees, as a share of the row's norm; NaN is infinite."""
    errors = []
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        rows = want.shape[0] if want.ndim else 1
        wide, exact = (
            np.asarray(jnp.asarray(array, jnp.float32), np.float64).reshape(rows, -1) for array in (got, want)
        )
        size = np.linalg.norm(exact, axis=1)
        error = np.linalg.norm(wide - exact, axis=1) / np.where(size > 0, size, 1.0)
        errors.append(np.max(np.where(np.isfinite(error), error, np.inf), initial=0.0))
    return np.asarray(errors)


def same_bits(first: object, second: object) -> bool:
    """Whether two pytrees hold the same bits."""
    return all(
        np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Random numbers; made in pieces of the first axis where the float32 numbers would be large."""
    if len(shape) > 2 and np.prod(shape) > 1 << 28:
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda one: normal(one, shape[1:], dtype, scale), keys)
    numbers = jax.random.normal(key, shape, jnp.float32) * scale
    if dtype == jnp.float8_e4m3fn:
        # What is too large for e4m3 would be NaN.
        numbers = jnp.clip(numbers, -448, 448)
    return numbers.astype(dtype)
