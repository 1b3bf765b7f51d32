"""Routed experts: three forms of one sum, chosen by the number of tokens.

out[n] = sum_j weights[n, j] * down_e(silu(gate_e x_n) * up_e x_n), e = experts[n, j]   (spec, section 4)

The expert weights are stacked in the checkpoint's layout: gate and up [E, F, D], down [E, D, F].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.layers.linear import linear, normal
from step3_jax.quant import BlockScaled, dequantise

# Up to this many (token, expert) pairs each pair is computed by itself: only chosen experts are read.
MAX_SINGLE_PAIRS = 12
# Rows of a block in the grouped form: enough to fill a matrix product, few enough to waste little padding.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 8, 128


class Experts(nnx.Module):
    """The routed experts of one layer.

    `capacity_factor` is for training: each expert takes at most that many times the even share of tokens, and what
    overflows is dropped. None (the default) never drops a token.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        wide = (num_experts, intermediate_size, hidden_size)
        self.gate_proj = nnx.Param(normal(rngs, wide, hidden_size, dtype))
        self.up_proj = nnx.Param(normal(rngs, wide, hidden_size, dtype))
        self.down_proj = nnx.Param(
            normal(rngs, (num_experts, hidden_size, intermediate_size), intermediate_size, dtype)
        )
        self.capacity_factor: float | None = None

    def __call__(
        self, hidden: Float[Array, "N D"], weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]
    ) -> Float[Array, "N D"]:
        stacks = [
            _plain(stack[...], hidden.dtype) for stack in (self.gate_proj, self.up_proj, self.down_proj)
        ]
        if self.capacity_factor is not None:
            num_pairs, num_experts = experts.size, stacks[0].shape[0]
            capacity = min(-(-int(num_pairs * self.capacity_factor) // num_experts), hidden.shape[0])
            return experts_by_capacity(hidden, weights, experts, *stacks, capacity=capacity)
        if experts.size <= MAX_SINGLE_PAIRS:
            return experts_by_pair(hidden, weights, experts, *stacks)
        return experts_by_block(hidden, weights, experts, *stacks)


def experts_by_pair(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "N D"]:
    """One (token, expert) pair after the other: for decoding a few tokens, where reading weights is all the cost."""
    rows = []
    for token in range(hidden.shape[0]):
        total = jnp.zeros(hidden.shape[1:], jnp.float32)
        for choice in range(experts.shape[1]):
            expert = experts[token, choice]
            out = _swiglu(hidden[token : token + 1], *(_pick(stack, expert) for stack in (gate, up, down)))
            total = total + weights[token, choice] * out[0].astype(jnp.float32)
        rows.append(total)
    return jnp.stack(rows).astype(hidden.dtype)


def experts_by_block(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "N D"]:
    """Pairs sorted by expert and cut in blocks of one expert each; a loop over blocks picks the block's expert.

    No token is dropped: there are at most ceil(pairs / rows) + E blocks, the padding of each expert's last block
    being all that is wasted.
    """
    num_tokens, top_k = experts.shape
    num_experts, num_pairs = gate.shape[0], experts.size
    rows = min(max(MIN_BLOCK_ROWS, 1 << max(num_pairs // num_experts - 1, 0).bit_length()), MAX_BLOCK_ROWS)
    num_blocks = min(-(-num_pairs // rows) + num_experts, num_pairs)
    flat = experts.reshape(-1)
    counts = jnp.bincount(flat, length=num_experts)
    blocks_each = -(-counts // rows)
    block_ends = jnp.cumsum(blocks_each)
    order = jnp.argsort(flat, stable=True)
    sorted_experts = flat[order]
    rank = jnp.arange(num_pairs) - (jnp.cumsum(counts) - counts)[sorted_experts]
    slots = (block_ends - blocks_each)[sorted_experts] * rows + rank
    # Slot -> token; empty slots point at a row of zeros behind the last token.
    tokens = (
        jnp.full((num_blocks * rows,), num_tokens, jnp.int32)
        .at[slots]
        .set((order // top_k).astype(jnp.int32))
    )
    padded = jnp.concatenate([hidden, jnp.zeros((1, hidden.shape[1]), hidden.dtype)])
    block_experts = jnp.searchsorted(block_ends, jnp.arange(num_blocks), side="right")

    def run_block(block: Int[Array, ""], outputs: Float[Array, "slots D"]) -> Float[Array, "slots D"]:
        picked = padded[jax.lax.dynamic_slice(tokens, (block * rows,), (rows,))]
        out = _swiglu(picked, *(_pick(stack, block_experts[block]) for stack in (gate, up, down)))
        return jax.lax.dynamic_update_slice(outputs, out, (block * rows, 0))

    outputs = jnp.zeros((num_blocks * rows, hidden.shape[1]), hidden.dtype)
    outputs = jax.lax.fori_loop(0, block_ends[-1], run_block, outputs)
    slot_of_pair = jnp.zeros((num_pairs,), jnp.int32).at[order].set(slots.astype(jnp.int32))
    gathered = outputs[slot_of_pair].reshape(num_tokens, top_k, -1).astype(jnp.float32)
    return jnp.einsum("NkD,Nk->ND", gathered, weights).astype(hidden.dtype)


def experts_by_capacity(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
    *,
    capacity: int,
) -> Float[Array, "N D"]:
    """All experts at once, each with `capacity` rows: for training, where a fixed shape and a fast gradient count.

    Pairs beyond an expert's capacity contribute nothing (GShard, arXiv 2006.16668).
    """
    num_tokens, top_k = experts.shape
    num_experts = gate.shape[0]
    flat = experts.reshape(-1)
    chosen = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)
    rank = jnp.take_along_axis(jnp.cumsum(chosen, axis=0) - chosen, flat[:, None], axis=1)[:, 0]
    slots = jnp.where(rank < capacity, flat * capacity + rank, num_experts * capacity)
    tokens = jnp.full((num_experts * capacity,), num_tokens, jnp.int32)
    tokens = tokens.at[slots].set(jnp.arange(flat.size, dtype=jnp.int32) // top_k, mode="drop")
    picked = hidden.at[tokens].get(mode="fill", fill_value=0).reshape(num_experts, capacity, -1)
    inner = jax.nn.silu(jnp.einsum("ECD,EFD->ECF", picked, gate)) * jnp.einsum("ECD,EFD->ECF", picked, up)
    outputs = jnp.einsum("ECF,EDF->ECD", inner, down).reshape(num_experts * capacity, -1)
    gathered = outputs.at[slots].get(mode="fill", fill_value=0).reshape(num_tokens, top_k, -1)
    return jnp.einsum("NkD,Nk->ND", gathered, weights.astype(gathered.dtype))


def _swiglu(
    hidden: Float[Array, "rows D"],
    gate: Float[Array, "F D"],
    up: Float[Array, "F D"],
    down: Float[Array, "D F"],
) -> Float[Array, "rows D"]:
    return linear(jax.nn.silu(linear(hidden, gate)) * linear(hidden, up), down)


def _pick(stack: Float[Array, "E rows columns"], expert: Int[Array, ""]) -> Float[Array, "rows columns"]:
    return jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False)


def _plain(
    stack: Float[Array, "E rows columns"] | BlockScaled, dtype: jnp.dtype
) -> Float[Array, "E rows columns"]:
    return dequantise(stack, dtype) if isinstance(stack, BlockScaled) else stack
