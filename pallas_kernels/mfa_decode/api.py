"""The public functions: shapes, formula, and the choice of an implementation."""

from __future__ import annotations

import functools
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.mfa_decode import mosaic, reference
from pallas_kernels.mfa_decode.plan import Plan, plan_work
from pallas_kernels.pages import CachedTokens
from pallas_kernels.quantise import quantise_rows
from pallas_kernels.storage import Storage

# Formats of pages that the kernel reads; there are plans for these.
KERNEL_STORAGES = tuple(mosaic.COMPUTE_DTYPES)


@overload
def mfa_decode(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    *,
    scale: float | None = None,
    plan: Plan | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H K"]: ...
@overload
def mfa_decode(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    *,
    scale: float | None = None,
    plan: Plan | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    return_lse: Literal[True],
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]: ...
def mfa_decode(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    *,
    scale: float | None = None,
    plan: Plan | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H K"] | tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Attention of the newest T tokens of each sequence over its cached tokens, one key/value head for all H heads.

    out[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s]) v[b, s] over s < lengths[b] - T + t + 1: the T tokens
    are the last of the cached ones (their keys and values are in the cache already), and none sees a later one.

    The kernel serves heads of 256 in bfloat16, fp8 and int4 pages on Hopper. Keys in fp8 and int4 are multiplied in e4m3,
    with queries in two terms that hold bfloat16 numbers exactly; fp8 values in float16, all else in bfloat16. Results are
    the same bits at each repetition, but not across batches, which are cut differently.

    Args:
      queries: The new tokens' queries, after RoPE.
      cached: What they see, the T new tokens among it. What the table has no room for is left out.
      scale: Of the scores; 1 / sqrt(K) if None.
      plan: What `plan_decode` made of these lengths, if several layers share it: eight small kernels are saved in each.
      out_dtype: Of the output; that of the queries if None.
      return_lse: Also return the logarithm of each softmax's denominator, to merge with attention over other keys.
      implementation: See `common.Implementation`.

    Returns:
      The output in `out_dtype`, zero where a token sees nothing; with `return_lse` also the log-sum-exp (natural
      logarithm, float32, -inf where a token sees nothing).

    Raises:
      ValueError: If shapes do not fit together.
      NotImplementedError: If the kernel is asked for by name and cannot serve these arguments.
    """
    dtype = jnp.dtype(queries.dtype if out_dtype is None else out_dtype)
    cached = _check(queries, cached, plan)
    if _is_empty(cached):
        out, lse = jnp.zeros(queries.shape, dtype), jnp.full(queries.shape[:3], -jnp.inf, jnp.float32)
        return (out, lse) if return_lse else out
    options = {"scale": _scale(queries, scale), "out_dtype": dtype}
    out, lse = dispatch(
        implementation,
        mosaic.unsupported(queries, cached.pages),
        functools.partial(reference.decode_attention, **options),
        functools.partial(mosaic.decode_attention, **options),
        queries,
        cached,
        plan,
    )
    return (out, lse) if return_lse else out


def mfa_decode_quantised(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    *,
    scale: float | None = None,
    plan: Plan | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "N columns"], Float[Array, "blocks padded_N"]]:
    """`mfa_decode` with the heads of each token quantised, as `fp8_matmul` reads them: quantise_rows(out), in float32.

    Args:
      queries, cached, scale, plan: As in `mfa_decode`.
      implementation: See `common.Implementation`. The kernel needs H to be a multiple of 64 besides.

    Returns:
      e4m3 values [B T, H K], and float32 scales of 128 columns in the layout "columns", [H K / 128, B T rounded up to 4], of
      which the kernel leaves what is past B T undefined.

    Raises:
      ValueError: If shapes do not fit together.
      NotImplementedError: If the kernel is asked for by name and cannot serve these arguments.
    """
    cached = _check(queries, cached, plan)
    if _is_empty(cached):
        batch, tokens, heads, head_dim = queries.shape
        return quantise_rows(jnp.zeros((batch * tokens, heads * head_dim)), scales_layout="columns")
    options = {"scale": _scale(queries, scale)}
    return dispatch(
        implementation,
        mosaic.unsupported(queries, cached.pages) or mosaic.unsupported_quantised(queries),
        functools.partial(reference.decode_quantised, **options),
        functools.partial(mosaic.decode_quantised, **options),
        queries,
        cached,
        plan,
    )


def _check(queries: Float[Array, "B T H K"], cached: CachedTokens, plan: Plan | None) -> CachedTokens:
    """`cached` as arrays alone; ValueError where shapes do not fit together."""
    batch, _, _, head_dim = queries.shape
    if cached.table.shape[0] != batch or cached.lengths.shape != (batch,):
        raise ValueError(
            f"{batch} sequences of queries need a table of {batch} rows and {batch} lengths; "
            f"given: {cached.table.shape[0]} and {cached.lengths.shape}"
        )
    if cached.pages.head_dim != head_dim:
        raise ValueError(
            f"queries have heads of {head_dim}, the pages rows of {cached.pages.head_dim}: they must be equal"
        )
    if plan is not None and plan.lengths.shape != (batch,):
        raise ValueError(f"the plan is for {plan.lengths.shape[0]} sequences, the queries are of {batch}")
    return cached._replace(first_page=jnp.asarray(cached.first_page, jnp.int32))


def _is_empty(cached: CachedTokens) -> bool:
    """Whether there is no sequence, or no page of any."""
    return cached.table.size == 0


def _scale(queries: Float[Array, "B T H K"], scale: float | None) -> float:
    return 1.0 / math.sqrt(queries.shape[3]) if scale is None else scale


def plan_decode(
    lengths: Int[Array, " B"],
    *,
    tokens: int,
    heads: int,
    storage: Storage,
    max_tokens: int,
    workers: int | None = None,
) -> Plan:
    """Divides a batch among the kernel's workers: once in a step, for the `mfa_decode` of all layers.

    Args:
      lengths: As `mfa_decode` gets.
      tokens, heads: T and H of the queries.
      storage: Of the pages.
      max_tokens: That a row of the table has room for: max_pages * page.
      workers: Spans to cut; by default as many as an H100 runs at once.

    Raises:
      ValueError: If there is no kernel for this storage.
    """
    if storage not in mosaic.COMPUTE_DTYPES:
        raise ValueError(f"there are plans for {', '.join(mosaic.COMPUTE_DTYPES)}, not for {storage}")
    sizes = mosaic.default_blocks(lengths.shape[0], tokens * heads, storage, max_tokens)
    count = sizes["workers"] if workers is None else workers
    return plan_work(lengths, capacity=max_tokens, workers=count, min_blocks=sizes["min_blocks"])
