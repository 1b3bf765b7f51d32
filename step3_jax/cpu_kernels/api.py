"""Products of activations with weights as they are stored, and attention over the KV cache, on CPUs.

Stored forms: float32 and bfloat16 arrays, FP8 (`BlockScaled`, 128 x 128), int8 (`BlockScaled`, 1 x 128), int4
(`PackedInt4`). A weight counts as value * scale rounded to float32; products are summed in float32, in an order that
neither the number of rows nor that of threads changes: a row's output does not depend on what is computed beside it.
Where `Kernels.activations` is bfloat16, activations are rounded to it before they meet weights in bfloat16 or FP8, and
the values of 128 columns of FP8 are summed before they are multiplied with their scale.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.pages import CachedTokens, KVPages
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.quant import FP8, GROUP, BlockScaled, PackedInt4

# Rows and columns of FP8 weights that share a scale.
FP8_BLOCKS = ((GROUP, GROUP), (1, GROUP))

# Sizes differ from weight to weight, so the axes have no names, which would be bound.
Stored = Float[Array, "..."] | BlockScaled | PackedInt4
MAX_PRODUCTS = 8
# Columns of a key that `attend` widens at once, at most.
HEAD_STEP = 32


def unsupported(weight: Stored) -> str | None:
    """Why the kernels do not take a weight; None if they do."""
    if isinstance(weight, PackedInt4):
        return None
    if not isinstance(weight, BlockScaled):
        known = (jnp.float32, jnp.bfloat16)
        return None if weight.dtype in known else f"the CPU kernels take float32 and bfloat16, not {weight.dtype}"
    blocks = {jnp.dtype(FP8): FP8_BLOCKS, jnp.dtype(jnp.int8): ((1, GROUP),)}
    allowed = blocks.get(weight.values.dtype)
    if allowed is None:
        return f"the CPU kernels take FP8 (e4m3) and int8 values, not {weight.values.dtype}"
    if weight.block not in allowed:
        return f"the CPU kernels take blocks of {' or '.join(map(str, allowed))}, not {weight.block}"
    return None


# The number of rows that are not padding, and the number of rows with it.
_FILLED: contextvars.ContextVar[tuple[Int[Array, ""], int] | None] = contextvars.ContextVar("filled", default=None)


@contextlib.contextmanager
def filled_rows(count: Int[Array, ""], num_rows: int) -> Iterator[None]:
    """Leaves padding out while the calls of a `with` block are traced: its outputs are 0.

    Applies to `products`, `swiglu` and `experts` of `num_rows` rows, of which `count` lead and the others are padding. The
    rows before it are computed as without it.
    """
    token = _FILLED.set((count, num_rows))
    try:
        yield
    finally:
        _FILLED.reset(token)


def products(kernels: Kernels, hidden: Float[Array, "N K"], weights: Sequence[Stored]) -> list[Float[Array, "N _"]]:
    """x W^T for several weights [O, K] in one call, which costs less than one call each.

    Args:
      kernels: See `loader.find_kernels`.
      hidden: Given to the kernel in float32; the outputs have its dtype.
      weights: At most `MAX_PRODUCTS`, of any forms.
    """
    shapes = [jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[0]), jnp.float32) for weight in weights]
    call = jax.ffi.ffi_call(kernels.target("products"), shapes)
    outputs = call(hidden.astype(jnp.float32), _count_filled(hidden), *jax.tree.leaves(list(weights)))
    return [out.astype(hidden.dtype) for out in outputs]


def swiglu(
    kernels: Kernels, hidden: Float[Array, "N D"], gate: Stored, up: Stored, down: Stored
) -> Float[Array, "N D"]:
    """down(silu(gate x) * up x) in one call."""
    call = jax.ffi.ffi_call(kernels.target("swiglu"), jax.ShapeDtypeStruct(hidden.shape, jnp.float32))
    weights = jax.tree.leaves([gate, up, down])
    return call(hidden.astype(jnp.float32), _count_filled(hidden), *weights).astype(hidden.dtype)


def experts(
    kernels: Kernels,
    hidden: Float[Array, "N D"],
    factors: Float[Array, "N top_k"],
    chosen: Int[Array, "N top_k"],
    stacks: Sequence[Stored],
    shared: Sequence[Stored] = (),
) -> Float[Array, "N D"]:
    """The sum of factor * SwiGLU over each token's experts, in the order of their numbers, in one call.

    Args:
      kernels: See `loader.find_kernels`.
      hidden: Tokens; given to the kernel in float32.
      factors: Of each token's experts.
      chosen: Their numbers; a pair whose number no stack has takes no part.
      stacks: Gate and up [E, F, D], and down [E, D, F]; only the chosen experts are read.
      shared: The same three of an expert that all tokens go to with factor 1, without E; none if empty.
    """
    call = jax.ffi.ffi_call(kernels.target("experts"), jax.ShapeDtypeStruct(hidden.shape, jnp.float32))
    routing = factors.astype(jnp.float32), chosen.astype(jnp.int32)
    given = hidden.astype(jnp.float32), _count_filled(hidden), *routing
    return call(*given, *jax.tree.leaves([list(stacks), list(shared)])).astype(hidden.dtype)


def attends(pages: KVPages) -> bool:
    """Whether `attend` takes these pages: in float32 or bfloat16, also as bits."""
    return pages.storage in ("float32", "bfloat16") and pages.head_dim % HEAD_STEP == 0


def attend(kernels: Kernels, queries: Float[Array, "B T H K"], cached: CachedTokens) -> Float[Array, "B T H K"]:
    """Attention of the newest T tokens of each sequence over its pages, as `mfa_decode` defines it, with its scale.

    All is computed in float32, each token by itself: its output has the same bits whatever else is in the call.

    Args:
      kernels: See `loader.find_kernels`.
      queries: After RoPE; given to the kernel in float32.
      cached: What they see; its pages are those that `attends` accepts.
    """
    pages, table, lengths, first_page = cached
    call = jax.ffi.ffi_call(kernels.target("attend"), jax.ShapeDtypeStruct(queries.shape, jnp.float32))
    scaled = queries.astype(jnp.float32) * queries.shape[-1] ** -0.5
    numbers = (array.astype(jnp.int32) for array in (table, lengths, jnp.asarray(first_page)))
    return call(scaled, pages.keys, pages.values, *numbers).astype(queries.dtype)


def rows(kernels: Kernels, table: Shaped[Array, "V K"], ids: Int[Array, "N"]) -> Shaped[Array, "N K"]:
    """Rows of an array of float32, bfloat16, FP8, int8 or uint8; ids out of range take the first or the last row.

    XLA:CPU would convert a whole array of small floats to float32 for that, or copy it whole to read it as bits: 1.8 GB
    for each decode call with Step3's embedding.
    """
    shape = jax.ShapeDtypeStruct((ids.shape[0], table.shape[1]), table.dtype)
    return jax.ffi.ffi_call(kernels.target("rows"), shape)(table, ids.astype(jnp.int32))


def _count_filled(hidden: Float[Array, "N _"]) -> Int[Array, ""]:
    """How many rows a kernel computes; see `filled_rows`."""
    num_rows = hidden.shape[0]
    filled = _FILLED.get()
    count = num_rows if filled is None or filled[1] != num_rows else filled[0]
    return jnp.asarray(count, jnp.int32)
