"""Queries as two e4m3 terms each, which the tensor cores multiply with e4m3 keys in their stored form.

A row is divided by a power of two that brings its largest number to [128, 256); the first term is the nearest e4m3 number,
the second the nearest to the remainder. For bfloat16 (8 significant bits) the two terms (4 each, and a sign) represent every
number exactly that is at least 2^-9 of the row's largest, and the others to 2^-17 of it: half of e4m3's smallest step. Both
terms are multiplied into one sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_ROW, Ref, Target
from pallas_kernels.mfa_decode.geometry import EXPONENT, ONE, TILE, Geometry, Refs

# Exponent of a row's largest number after the division: 2^7, and at most twice that.
SCALED = 128.0
# The smallest distinct exponent, so that factor and inverse are normal numbers.
LEAST_EXPONENT = 8 << 23


def split_queries(
    geometry: Geometry, target: Target, refs: Refs, warpgroup: jax.Array, tile: jax.Array, sequence: jax.Array
) -> None:
    """Writes a tile's terms to shared memory and, for each warpgroup, the factors of its rows.

    Straight from device memory: there are few loads per fragment, and no buffer has to hold the 16-bit queries. With
    one tile each warpgroup writes half of the parts, and then waits for the other.
    """
    columns, parts = geometry.part_columns, geometry.num_parts
    source = refs["rows"].at[sequence, pl.ds(tile * TILE, TILE)]
    rows = pl.ds(warpgroup * TILE if geometry.is_shared else 0, TILE)

    def read(part: jax.Array | int) -> jax.Array:
        return target.load(source.at[:, pl.ds(part * columns, columns)], WGMMA).astype(jnp.float32)

    largest = target.full((TILE,), 0.0, WGMMA_ROW)
    for part in range(parts):
        largest = jnp.maximum(largest, jnp.max(jnp.abs(read(part)), axis=1))
    exponent = jnp.maximum(lax.bitcast_convert_type(largest, jnp.int32) & EXPONENT, LEAST_EXPONENT)
    inverse = lax.bitcast_convert_type(2 * ONE - exponent, jnp.float32) * SCALED
    # Every warp of this warpgroup has finished its products with the previous queries, see `worker`.
    plgpu.commit_smem()
    refs["factors"].at[warpgroup][...] = lax.bitcast_convert_type(exponent, jnp.float32) * (1 / SCALED)
    for index in range(parts if geometry.is_shared else parts // 2):
        part = index if geometry.is_shared else warpgroup * (parts // 2) + index
        scaled = read(part) * lax.broadcast_in_dim(inverse, (TILE, columns), [0])
        for term, numbers in enumerate(terms(scaled)):
            refs["queries"].at[term, part, rows][...] = numbers
    plgpu.commit_smem()
    if not geometry.is_shared:
        plgpu.barrier_arrive(refs["split"])
        plgpu.barrier_wait(refs["split"])


def terms(scaled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two e4m3 terms of float32 numbers up to 256."""
    first = scaled.astype(jnp.float8_e4m3fn)
    # Hopper converts e4m3 only to float16.
    rest = scaled - first.astype(jnp.float16).astype(jnp.float32)
    return first, rest.astype(jnp.float8_e4m3fn)


def operands(
    geometry: Geometry, refs: Refs, warpgroup: jax.Array, part: jax.Array | int, keys: Ref
) -> list[tuple[Ref, Ref]]:
    """The products of a part of a tile's queries with the same part of a block's keys, to be added up."""
    rows = pl.ds(warpgroup * TILE if geometry.is_shared else 0, TILE)
    return [(refs["queries"].at[term, part, rows], keys) for term in range(2)]
