"""Helpers shared by the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

# Errors are judged row by row: in a norm over all rows, a short row, exact and large, would hide a long one's error.


def row_errors(actual: jax.Array | np.ndarray, expected: jax.Array | np.ndarray) -> np.ndarray:
    """|actual - expected| / |expected| of each leading row, float64; the plain norm where a row is zero."""
    got, want = (np.asarray(array).astype(np.float64).reshape(len(expected), -1) for array in (actual, expected))
    size = np.linalg.norm(want, axis=1)
    return np.linalg.norm(got - want, axis=1) / np.where(size > 0, size, 1.0)


def lower_for_cuda(function: Callable[..., object], *args: object) -> str:
    """The program of `function` for CUDA as text; needs no GPU. Mosaic checks shapes, layouts and memory on the way."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
