"""What `mfa_decode` means, in plain JAX; also the model's path on a CPU.

It is float32 throughout, and so more exact than the kernel, whose weights and values have 16 bits and whose queries are two
e4m3 terms over fp8 and int4 pages: the tests allow the two to differ by a few thousandths of a token's norm.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mfa_decode.plan import Plan
from pallas_kernels.pages import CachedTokens, gather_rows
from pallas_kernels.quantise import quantise_rows

# Tokens of each sequence that are decoded and multiplied at a time, as long as any sequence of the batch has more: so a
# table's width costs nothing. Of 32 sequences they stay in a CPU's cache: 2,048 at a time took 3 to 7 times as long.
CHUNK = 256
# A product of fewer multiplications XLA:CPU sums in another order, for a lone sequence. Its rows are filled up, so that a
# token's output is the same in bits however many tokens are computed with it.
MIN_PRODUCT = 2**18
FLOOR = -1e30


def decode_attention(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    work: Plan | None = None,
    *,
    scale: float,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
    """Output and log-sum-exp; see `api.mfa_decode`. Scores, weights and sums are float32. `work` is for the kernel only."""
    del work
    pages, table, lengths, first_page = cached
    batch, tokens, heads, head_dim = queries.shape
    num_rows = tokens * heads
    pages_per_chunk = min(max(1, CHUNK // pages.page_size), table.shape[1])
    chunk = pages_per_chunk * pages.page_size
    padding = (0, max(0, -(-MIN_PRODUCT // (head_dim * chunk)) - num_rows) if batch == 1 else 0)
    rows = jnp.pad(queries.astype(jnp.float32).reshape(batch, num_rows, head_dim) * scale, ((0, 0), padding, (0, 0)))
    # Pages may hold anything past a sequence's end, NaN too, so their values are cleared, not just weighted by zero.
    ends = jnp.pad(jnp.repeat(lengths[:, None] - tokens + 1 + jnp.arange(tokens), heads, axis=1), ((0, 0), padding))
    num_chunks = -(-table.shape[1] // pages_per_chunk)
    table = jnp.pad(table, ((0, 0), (0, num_chunks * pages_per_chunk - table.shape[1])))

    def attend_chunk(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, top, norm = carry
        page_ids = jax.lax.dynamic_slice_in_dim(table, index * pages_per_chunk, pages_per_chunk, axis=1)
        positions = index * chunk + jnp.arange(chunk)
        # Numbers past the end are as free as the rows there: they must not lead outside the pages.
        is_cached = positions < lengths[:, None]
        page_ids = jnp.where(is_cached[:, :: pages.page_size], page_ids + first_page, 0)
        keys, values = gather_rows(pages, page_ids, jnp.dtype(jnp.float32))
        values = jnp.where(is_cached[:, :, None], values, 0)
        scores = jnp.einsum("BQK,BSK->BQS", rows, keys, preferred_element_type=jnp.float32)
        is_visible = (positions < ends[:, :, None]) & is_cached[:, None, :]
        scores = jnp.where(is_visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=2))
        weights = jnp.exp(scores - new_top[:, :, None])
        shrink = jnp.exp(top - new_top)
        added = jnp.einsum("BQS,BSK->BQK", weights, values, preferred_element_type=jnp.float32)
        return total * shrink[:, :, None] + added, new_top, norm * shrink + jnp.sum(weights, axis=2)

    carry = (jnp.zeros_like(rows), jnp.full(rows.shape[:2], FLOOR), jnp.zeros(rows.shape[:2], jnp.float32))
    if num_chunks == 1:
        total, top, norm = attend_chunk(jnp.int32(0), carry)
    else:
        needed = jnp.minimum(-(-jnp.max(lengths, initial=0) // chunk), num_chunks)
        total, top, norm = jax.lax.fori_loop(0, needed, attend_chunk, carry)
    is_any = norm > 0
    out = total / jnp.where(is_any, norm, 1.0)[:, :, None]
    lse = jnp.where(is_any, top + jnp.log(jnp.where(is_any, norm, 1.0)), -jnp.inf)
    out, lse = out[:, :num_rows], lse[:, :num_rows]
    return out.astype(queries.dtype if out_dtype is None else out_dtype).reshape(queries.shape), lse.reshape(
        queries.shape[:3]
    )


def decode_quantised(
    queries: Float[Array, "B T H K"],
    cached: CachedTokens,
    work: Plan | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "N columns"], Float[Array, "blocks padded_N"]]:
    """See `api.mfa_decode_quantised`."""
    out, _ = decode_attention(queries, cached, work, scale=scale, out_dtype=jnp.dtype(jnp.float32))
    batch, tokens, heads, head_dim = out.shape
    return quantise_rows(out.reshape(batch * tokens, heads * head_dim), scales_layout="columns")
