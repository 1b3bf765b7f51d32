"""The kernel: a persistent grid, two warpgroups that compute and one that loads.

One tile is 64 rows, a row one head of one new token. A worker (`plan.py`) walks its span of 64-token blocks:

- one tile (T*H <= 64): the computing warpgroups take alternate blocks, each with its own ring of shared-memory slots,
  its own sums, and a merge at the end of each fragment. Two blocks' latencies (product, softmax, product) overlap.
- more tiles: each warpgroup has a tile, both read the same ring, so a block is loaded once for 128 rows. Further pairs of
  tiles are further CTAs that walk the same spans at the same time and find the blocks in L2.

A ring's slots alternate keys and values. Slots and bytes in flight for one SM, K = 256 (of 227 KB):

| storage | slot | one tile: slots, under way | two tiles |
| --- | --- | --- | --- |
| bfloat16 | 32 KB | 3 + 3, 128 KB | 5 |
| fp8 | 16 KB + 256 B | 3 + 3, 65 KB, and 32 KB of float16 values for each warpgroup | 5 |
| int4 | 8 KB + 512 B | 4 + 4, 51 KB, and 32 KB of bfloat16 values and 16 KB of e4m3 keys for each warpgroup | 6 |

Bytes: lengths.sum() * bytes_per_token once, queries and fragments (64 K * 4 bytes each, written and read). Operations:
4 * rows * K for each token; at 64 rows 64 a byte in bfloat16, so memory is the limit (25 GB/s * 132 SMs: 2.6 us a block
in bfloat16, 1.3 in fp8, 0.7 in int4, against 0.6 us of tensor core).

What else a block costs is shared memory's traffic, 128 bytes a clock. fp8: 32 KB from the copies, 16 read and 32 written
by the conversion of values, 64 read by the products of keys (queries and keys, for each term), 32 by those of values:
1,412 clocks, where converted keys took 1,796 of the 1,793 to 2,023 that an H200's memory gives. int4: 17, 17 and 48, 64 and
32: 1,424 of 938 to 1,058, where keys in bfloat16 took 1,552; so int4 is not bound by memory there.

Registers: the sums take 128 of a thread's 240. Compiled for sm_90a 130 to 200 bytes are spilled with one tile, mostly
addresses that the compiler keeps across blocks and what the merge needs once a fragment.

fp8: queries are two e4m3 terms (see `queries`), keys are multiplied as stored, values are converted to float16 while the
product of the keys runs. A token's key scale multiplies its column of scores. Of its value scale 2^e * r the exponent joins
the score and r, in [1, 2), the weight, which so stays in float16's range whatever the scale; the sum of weights gets 2^-e
back. int4: keys are unpacked to e4m3, and the product of each 64 columns gets their scales; values become bfloat16, scaled.

The compiler's own barriers around stores are off: `plgpu.commit_smem`, a barrier of the warpgroup, stands where a buffer
is written that another warp's product may still read, and after the stores.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.compat import Ref, Target, swizzled
from pallas_kernels.mfa_decode import combine, plan
from pallas_kernels.mfa_decode.geometry import TILE, Geometry
from pallas_kernels.mfa_decode.worker import compute, load
from pallas_kernels.pages import CachedTokens, KVPages

HEAD_DIM = 256
COMPUTE_DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float16, "int4": jnp.bfloat16}
# Slots of a ring: with one tile two rings share the memory, with more there is one.
SLOTS = {("bfloat16", 1): 3, ("bfloat16", 2): 5, ("fp8", 1): 3, ("fp8", 2): 5, ("int4", 1): 4, ("int4", 2): 6}
# The interpreter compiles the body anew for each CTA.
INTERPRETED = {"workers": 2, "columns": HEAD_DIM, "unroll": 2}


def unsupported(queries: Float[Array, "B T H K"], pages: KVPages) -> str | None:
    """Why the kernel cannot serve these arguments; None if it can."""
    if pages.storage not in COMPUTE_DTYPES:
        return f"mfa_decode's kernel reads pages of {', '.join(COMPUTE_DTYPES)}, not {pages.storage}"
    if pages.is_bits:
        return "mfa_decode's kernel reads pages of floats, not of their bits"
    if queries.shape[3] != HEAD_DIM:
        return f"mfa_decode's kernel serves heads of {HEAD_DIM}, not {queries.shape[3]}"
    if pages.page_size % plan.BLOCK:
        return f"mfa_decode's kernel reads blocks of {plan.BLOCK} tokens, which pages of {pages.page_size} are not cut into"
    return None


def default_blocks(batch: int, rows: int, storage: str, max_tokens: int) -> dict[str, int]:
    """Tunable sizes: measured ones where there are any.

    workers: CTAs that a tile pair's work is cut for; 132 SMs hold one each. min_blocks: see `plan.plan_work`.
    slots: of a ring. columns, unroll: see `combine.combine`; many fragments of few sequences want many loads under way.
    """
    tiles = -(-rows // TILE)
    defaults = {
        "workers": max(1, 132 // -(-tiles // 2)),
        "min_blocks": 4,
        "slots": SLOTS[storage, min(tiles, 2)],
        "columns": 32,
        "unroll": 8 if batch * tiles <= 16 else 2,
    }
    return tuning.blocks("mfa_decode", defaults, batch=batch, rows=rows, storage=storage, max_tokens=max_tokens)


def decode_attention(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    work: plan.Plan | None = None,
    *,
    scale: float,
    out_dtype: jax.typing.DTypeLike | None = None,
    interpret: bool,
    detect_races: bool = False,
    blocks: dict[str, int] | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Output and log-sum-exp; see `api.mfa_decode`.

    Args:
      queries, cached, scale: As there.
      work: Of `api.plan_decode`; made here if None.
      out_dtype: As there.
      interpret: Run on a CPU.
      detect_races: The interpreter looks for unordered accesses.
      blocks: Overrides of `default_blocks`.
    """
    _, tokens, heads, _ = queries.shape
    target, sizes = Target(interpret, detect_races), _choose_sizes(queries, cached, interpret, blocks)
    *fragments, work = _attend_fragments(queries, cached, work, scale, target, sizes)
    out, lse = combine.combine(
        *fragments,
        work.fragments,
        dtype=queries.dtype if out_dtype is None else out_dtype,
        target=target,
        columns=sizes["columns"],
        unroll=sizes["unroll"],
    )
    used = slice(0, tokens * heads)
    return out[:, used].reshape(queries.shape), lse[:, used].reshape(queries.shape[:3])


def decode_quantised(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    work: plan.Plan | None = None,
    *,
    scale: float,
    interpret: bool,
    detect_races: bool = False,
    blocks: dict[str, int] | None = None,
) -> tuple[Float[Array, "N columns"], Float[Array, "blocks padded_N"]]:
    """See `api.mfa_decode_quantised`; arguments as of `decode_attention`."""
    target, sizes = Target(interpret, detect_races), _choose_sizes(queries, cached, interpret, blocks)
    *fragments, work = _attend_fragments(queries, cached, work, scale, target, sizes)
    return combine.combine_quantised(
        *fragments, work.fragments, heads=queries.shape[2], tokens=queries.shape[1], target=target
    )


def unsupported_quantised(queries: Float[Array, "B T H K"]) -> str | None:
    """Why the kernel cannot quantise these heads; None if it can."""
    if queries.shape[2] % TILE:
        return f"mfa_decode's kernel quantises a multiple of {TILE} heads, not {queries.shape[2]}"
    return None


def _choose_sizes(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    interpret: bool,
    blocks: dict[str, int] | None,
) -> dict[str, int]:
    batch, tokens, heads, _ = queries.shape
    sizes = default_blocks(batch, tokens * heads, cached.pages.storage, cached.max_tokens)
    sizes.update(INTERPRETED if interpret else {})
    sizes.update(blocks or {})
    return sizes


def _attend_fragments(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    work: plan.Plan | None,
    scale: float,
    target: Target,
    sizes: dict[str, int],
) -> tuple[Float[Array, "F R K"], Float[Array, "F R"], Float[Array, "F R"], plan.Plan]:
    """What `_attend` gives, and the plan."""
    (batch, tokens, heads, head_dim), pages = queries.shape, cached.pages
    geometry = Geometry(
        storage=pages.storage,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        page_size=pages.page_size,
        slots=sizes["slots"],
        scale=scale * math.log2(math.e),
        dtype=COMPUTE_DTYPES[pages.storage],
    )
    if work is None:
        workers, min_blocks = sizes["workers"], sizes["min_blocks"]
        work = plan.plan_work(cached.lengths, capacity=cached.max_tokens, workers=workers, min_blocks=min_blocks)
    rows = queries.reshape(batch, tokens * heads, head_dim)
    if not geometry.is_narrow:
        rows = rows.astype(geometry.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, geometry.rows - tokens * heads), (0, 0)))
    return *_attend(geometry, target, rows, cached, work), work


def _attend(
    geometry: Geometry,
    target: Target,
    rows: Float[Array, "B R K"],
    cached: CachedTokens,
    work: plan.Plan,
) -> tuple[Float[Array, "F R K"], Float[Array, "F R"], Float[Array, "F R"]]:
    """Sums, maxima and norms of each fragment."""
    pages, workers = cached.pages, work.spans.shape[0]
    count = plan.num_fragments(cached.table.shape[0], workers)
    total_slots = geometry.rings * geometry.slots
    num_rows = geometry.tiles_per_cta * TILE
    scratch = {
        "ring": plgpu.SMEM(
            (total_slots, plan.BLOCK, pages.keys.shape[2]), pages.keys.dtype, transforms=swizzled(pages.keys.dtype)
        ),
        "full": plgpu.Barrier(num_arrivals=1 if pages.key_scales is None else 2, num_barriers=total_slots),
        "free": plgpu.Barrier(num_arrivals=geometry.tiles_per_cta, num_barriers=total_slots),
    }
    if geometry.is_narrow:
        scratch["queries"] = _e4m3(geometry, 2, geometry.num_parts, num_rows, geometry.part_columns)
        scratch["factors"] = plgpu.SMEM((2, TILE), jnp.float32)
    else:
        scratch["queries"] = plgpu.SMEM(
            (num_rows, geometry.head_dim), geometry.dtype, transforms=swizzled(geometry.dtype)
        )
        scratch["queries_full"] = plgpu.Barrier()
        # With one tile the first warpgroup is the last to read, in the merge; else each frees its own half.
        scratch["queries_free"] = plgpu.Barrier(num_arrivals=geometry.tiles_per_cta)
    if pages.key_scales is not None:
        scratch["scales"] = plgpu.SMEM((total_slots, pages.key_scales.shape[1], plan.BLOCK), pages.key_scales.dtype)
        scratch["decoded"] = plgpu.SMEM(
            (2, plan.BLOCK, geometry.head_dim), geometry.dtype, transforms=swizzled(geometry.dtype)
        )
    if geometry.storage == "int4":
        scratch["unpacked"] = _e4m3(geometry, 2, geometry.num_parts, plan.BLOCK, geometry.part_columns)
    if geometry.is_shared:
        scratch["cleared"] = plgpu.Barrier(num_arrivals=2)
    else:
        scratch["sums"] = plgpu.SMEM((2, TILE), jnp.float32)
        scratch.update(read=plgpu.Barrier(), given=plgpu.Barrier(), taken=plgpu.Barrier())
        if geometry.is_narrow:
            scratch["split"] = plgpu.Barrier(num_arrivals=2)

    names = ["starts", "spans", "lengths", "table", "first_page", "rows", "keys", "values"]
    table, first_page = cached.table.astype(jnp.int32), jnp.asarray(cached.first_page, jnp.int32).reshape(1)
    arrays = [work.starts, work.spans, work.lengths, table, first_page, rows, pages.keys, pages.values]
    if pages.key_scales is not None and pages.value_scales is not None:
        names += ["key_scales", "value_scales"]
        arrays += [pages.key_scales, pages.value_scales]
    names += ["parts", "tops", "norms", *scratch]

    def mfa_decode(*refs: Ref) -> None:
        named = dict(zip(names, refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < 2)
        def run_compute() -> None:
            # 3 warpgroups start with 168 registers a thread each: 2 * 240 + 24 = 504 = 3 * 168.
            plgpu.set_max_registers(240, action="increase")
            compute(geometry, target, warpgroup, named)

        @pl.when(warpgroup == 2)
        def run_load() -> None:
            plgpu.set_max_registers(24, action="decrease")
            load(geometry, named)

    parts, tops, norms = plgpu.kernel(
        mfa_decode,
        out_type=[
            jax.ShapeDtypeStruct((count, geometry.rows, geometry.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((count, geometry.rows), jnp.float32),
            jax.ShapeDtypeStruct((count, geometry.rows), jnp.float32),
        ],
        grid=(workers, geometry.rows // TILE // geometry.tiles_per_cta),
        grid_names=("worker", "pair"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=list(scratch.values()),
        # Rows are reduced within warps, and every byte is needed.
        **target.kernel_options(reduction_scratch_bytes=0, auto_barriers=False),
    )(*arrays)
    return parts, tops, norms


def _e4m3(geometry: Geometry, *shape: int) -> object:
    """A buffer of e4m3 operands."""
    return plgpu.SMEM(shape, jnp.float8_e4m3fn, transforms=swizzled(jnp.float8_e4m3fn, geometry.part_columns))
