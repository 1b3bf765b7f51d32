"""Routed experts: three ways to compute one sum, chosen by the number of tokens.

out[n] = sum_j weights[n, j] * down_e(silu(gate_e x_n) * up_e x_n), e = experts[n, j]

The expert weights are stacked in the checkpoint's layout: gate and up [E, F, D], down [E, D, F].
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch
from pallas_kernels.grouped_matmul.api import moe_ffn
from pallas_kernels.storage import BLOCK as FP8_BLOCK
from step3_jax.cpu_kernels.api import experts as run_experts
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.linear import fp8_parts, is_fp8, linear, normal
from step3_jax.layers.rows import Rows, as_plain, as_rows
from step3_jax.layers.stored import Stored
from step3_jax.quant import BlockScaled, PackedInt4, Quantised, dequantise
from step3_jax.stack import LayerOf, parts, pick

# Up to this many (token, expert) pairs, each pair is computed separately: only chosen experts are read. More for separate
# stacks: XLA:CPU's product of eight rows costs about three times as much as that of one.
MAX_SINGLE_PAIRS, MAX_SINGLE_PAIRS_SEPARATE = 12, 48
# Rows of a block in the grouped form. Reading an expert for a block costs about as much as 26 rows do, so few large blocks
# are best; the rest goes to at most this many small ones.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 8, 256
MAX_SMALL_BLOCKS = 2

# An expert's matrix below this size may as well be copied: it stays in the processor's cache, and the program is smaller.
MIN_SEPARATE_BYTES = 2**20
STACKS = ("gate_proj", "up_proj", "down_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeparateStack:
    """One array for each expert, instead of one stack of all.

    XLA:CPU copies a slice of a stack before it multiplies; a separate array is read in place.

    Attributes:
      parts: Each [rows, columns].
    """

    parts: tuple[Float[Array, "rows columns"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def __getitem__(self, index: types.EllipsisType) -> SeparateStack:
        """`array[...]` is the array itself: `nnx.Param` reads its value like this."""
        if index is not ...:
            raise ValueError(f"a separate stack takes no index but [...]; {index!r} was given")
        return self


# Gate and up have the sizes of down swapped, so the axes have no names that would bind.
Stack = Float[Array, "E _ _"] | SeparateStack


class Experts(nnx.Module):
    """The routed experts of one layer.

    Attributes:
      capacity_factor: For training: each expert takes at most this many times the even share of tokens, and the overflow
        is dropped. None (the default) never drops a token.
      quantises: As in `Linear`.
      cpu_kernels: Compute the sum from weights in their stored form, if `model.cpu` has set them.
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
        self.quantises = False
        self.cpu_kernels: Kernels | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether it multiplies quantised rows."""
        return self.quantises and all(is_fp8(getattr(self, name).get_value()) for name in STACKS)

    def __call__(
        self,
        hidden: Float[Array, "N D"] | Rows,
        weights: Float[Array, "N top_k"],
        experts: Int[Array, "N top_k"],
        *,
        all_experts: int | None = None,
        shared: Sequence[Stored] = (),
    ) -> Float[Array, "N D"]:
        """The sum for N tokens.

        `all_experts` says that the stacks are a part of this many experts: an id of E then stands for one that is not
        here, whose weight must be 0. `shared` are the weights of an expert for all tokens, which the CPU kernels add in the
        same call.
        """
        stacks = [getattr(self, name)[...] for name in STACKS]
        if self.cpu_kernels is not None:
            return run_experts(self.cpu_kernels, as_plain(hidden), weights, experts, stacks, shared)
        if self.takes_rows:
            return _experts_fp8(as_rows(hidden), weights, experts, stacks, all_experts=all_experts)
        hidden = as_plain(hidden)
        if self.capacity_factor is None:
            unsupported = _kernel_unsupported(hidden.dtype, stacks)
            plain, kernel = (
                functools.partial(form, all_experts=all_experts) for form in (_experts_plain, _experts_kernel)
            )
            return dispatch("auto", unsupported, plain, kernel, hidden, weights, experts, stacks)
        stacks = [_plain(stack, hidden.dtype) for stack in stacks]
        if any(isinstance(stack, SeparateStack) for stack in stacks):
            raise ValueError("capacity_factor is for training, separate_experts for inference: use one of them")
        num_pairs, num_experts = experts.size, stacks[0].shape[0]
        capacity = min(-(-int(num_pairs * self.capacity_factor) // num_experts), hidden.shape[0])
        return experts_by_capacity(hidden, weights, experts, *stacks, capacity=capacity)


def separate_experts(model: nnx.Module) -> None:
    """Splits the stacks of experts in `model`, for inference on CPUs; see `SeparateStack`.

    The arrays of the parts are copied only where jax cannot share host memory. Quantised stacks, small ones, and those
    that the CPU kernels read are unchanged.
    """
    for _, module in nnx.iter_modules(model):
        for name in STACKS if isinstance(module, Experts) and module.cpu_kernels is None else ():
            stack = getattr(module, name).get_value()
            # An additional axis is the layers.
            if isinstance(stack, jax.Array) and stack.ndim == 3 and stack.nbytes >= len(stack) * MIN_SEPARATE_BYTES:
                host = np.asarray(stack)
                parts = tuple(jax.device_put(host[expert], may_alias=True) for expert in range(len(host)))
                # A new parameter: another module may share the old one.
                setattr(module, name, nnx.Param(SeparateStack(parts)))


def experts_by_pair(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Stack,
    up: Stack,
    down: Stack,
) -> Float[Array, "N D"]:
    """One (token, expert) pair after the other: for decoding a few tokens, where reading weights is all the cost."""
    top_k = experts.shape[1]
    # Pairs of one expert are consecutive: its weights are still in the processor's cache. A token has no expert twice.
    order = jnp.argsort(experts.reshape(-1)) if len(hidden) > 1 else jnp.arange(top_k)

    def add_pair(index: int | Int[Array, ""], total: Float[Array, "N D"]) -> Float[Array, "N D"]:
        token, choice = order[index] // top_k, order[index] % top_k
        out = _run_expert(jax.lax.dynamic_slice_in_dim(hidden, token, 1), experts[token, choice], (gate, up, down))
        return total.at[token].add(weights[token, choice] * out[0].astype(jnp.float32))

    total = jnp.zeros(hidden.shape, jnp.float32)
    if isinstance(gate, SeparateStack):
        # A loop, so that the choice among all experts is compiled once and not once per pair.
        return jax.lax.fori_loop(0, experts.size, add_pair, total).astype(hidden.dtype)
    for index in range(experts.size):
        total = add_pair(index, total)
    return total.astype(hidden.dtype)


def experts_by_block(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Stack,
    up: Stack,
    down: Stack,
    *,
    all_experts: int | None = None,
) -> Float[Array, "N D"]:
    """Pairs sorted by expert and cut into blocks of one expert each; a loop over blocks picks the block's expert.

    No token is dropped: there are at most ceil(pairs / rows) + E blocks, and only the padding of each expert's last block
    is wasted. Pairs of an expert that is not here (see `Experts.__call__`) take no block.
    """
    num_tokens, top_k = experts.shape
    num_experts, num_pairs = gate.shape[0], experts.size
    large, small = block_rows(num_pairs, all_experts or num_experts)
    flat = experts.reshape(-1)
    counts = jnp.bincount(flat, length=num_experts)
    # A remainder that would fill three small blocks or more may as well be one large block.
    rest = counts % large
    is_large = (rest > MAX_SMALL_BLOCKS * small) | (small == large)
    num_small = jnp.where(is_large, 0, -(-rest // small))
    num_large = counts // large + (is_large & (rest > 0))
    slots_each = num_large * large + num_small * small
    first_slots = jnp.cumsum(slots_each) - slots_each
    order = jnp.argsort(flat, stable=True)
    sorted_experts = flat[order]
    rank = jnp.arange(num_pairs) - (jnp.cumsum(counts) - counts)[sorted_experts]
    # The most padding of an expert's last block; no block is without a pair.
    padding = max(large - MAX_SMALL_BLOCKS * small, small)
    num_slots = num_pairs + min(num_experts, num_pairs) * padding
    slots = jnp.where(sorted_experts < num_experts, first_slots[sorted_experts] + rank, num_slots)
    # Slot -> token; empty slots point at a row of zeros after the last token.
    tokens = jnp.full((num_slots,), num_tokens, jnp.int32)
    tokens = tokens.at[slots].set((order // top_k).astype(jnp.int32), mode="drop")
    padded = jnp.concatenate([hidden, jnp.zeros((1, hidden.shape[1]), hidden.dtype)])

    def run_blocks(
        rows: int, blocks_each: Int[Array, " E"], skipped: Int[Array, " E"], outputs: Float[Array, "slots D"]
    ) -> Float[Array, "slots D"]:
        """All blocks of one size; an expert's come after the slots that are `skipped`."""
        ends = jnp.cumsum(blocks_each)

        def run_block(block: Int[Array, ""], outputs: Float[Array, "slots D"]) -> Float[Array, "slots D"]:
            expert = jnp.searchsorted(ends, block, side="right")
            index = block - (ends - blocks_each)[expert]
            start = first_slots[expert] + skipped[expert] + index * rows
            picked = padded[jax.lax.dynamic_slice(tokens, (start,), (rows,))]
            out = _run_expert(picked, expert, (gate, up, down))
            return jax.lax.dynamic_update_slice(outputs, out, (start, 0))

        return jax.lax.fori_loop(0, ends[-1], run_block, outputs)

    outputs = jnp.zeros((num_slots, hidden.shape[1]), hidden.dtype)
    outputs = run_blocks(large, num_large, jnp.zeros_like(counts), outputs)
    # A loop for each size: choosing between sizes inside one loop would copy `outputs` for every block.
    if small < large:
        outputs = run_blocks(small, num_small, num_large * large, outputs)
    slot_of_pair = jnp.zeros((num_pairs,), jnp.int32).at[order].set(slots.astype(jnp.int32))
    gathered = outputs[slot_of_pair].reshape(num_tokens, top_k, -1).astype(jnp.float32)
    return jnp.einsum("NkD,Nk->ND", gathered, weights).astype(hidden.dtype)


def block_rows(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """Rows of a large block, which holds slightly more than an expert's even share, and of a small one."""
    share = -(-num_pairs * 9 // (num_experts * 8))
    large = min(max(-(-share // MIN_BLOCK_ROWS) * MIN_BLOCK_ROWS, MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
    return large, max(large // 4, MIN_BLOCK_ROWS)


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
    """All experts at once, each with `capacity` rows: for training, where a fixed shape and a fast gradient matter.

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


def _run_expert(
    hidden: Float[Array, "rows D"], expert: Int[Array, ""], stacks: tuple[Stack, Stack, Stack]
) -> Float[Array, "rows D"]:
    """One expert's SwiGLU, the expert known only at run time."""
    gate, up, down = stacks
    if isinstance(gate, SeparateStack) and isinstance(up, SeparateStack) and isinstance(down, SeparateStack):
        parts = zip(gate.parts, up.parts, down.parts, strict=True)
        return jax.lax.switch(expert, [functools.partial(_swiglu, gate=g, up=u, down=d) for g, u, d in parts], hidden)
    return _swiglu(hidden, *(jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False) for stack in stacks))


def _plain(stack: Stack | Quantised | LayerOf, dtype: jnp.dtype) -> Stack:
    picked = pick(stack)
    return dequantise(picked, dtype) if isinstance(picked, BlockScaled | PackedInt4) else cast(Stack, picked)


def _experts_plain(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    stacks: list[Stack | BlockScaled | LayerOf],
    *,
    all_experts: int | None,
) -> Float[Array, "N D"]:
    plain = [_plain(stack, hidden.dtype) for stack in stacks]
    # Computed one by one, pairs whose expert is elsewhere would cost as much as the others.
    most = MAX_SINGLE_PAIRS_SEPARATE if isinstance(plain[0], SeparateStack) else MAX_SINGLE_PAIRS
    if experts.size <= most and all_experts is None:
        return experts_by_pair(hidden, weights, experts, *plain)
    return experts_by_block(hidden, weights, experts, *plain, all_experts=all_experts)


def _experts_kernel(
    hidden: Float[Array, "N D"],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    stacks: list[Stack | BlockScaled | LayerOf],
    *,
    all_experts: int | None,
    interpret: bool,
) -> Float[Array, "N D"]:
    (gate, layer), (up, _), (down, _) = (parts(stack) for stack in stacks)
    return moe_ffn(
        hidden,
        weights,
        experts,
        gate,
        up,
        down,
        all_experts=all_experts,
        layer=layer,
        implementation="interpret" if interpret else "mosaic",
    )


def _experts_fp8(
    rows: Rows,
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    stacks: list[BlockScaled | LayerOf],
    *,
    all_experts: int | None,
) -> Float[Array, "N D"]:
    """The sum with every product in FP8, on any device: the model decides what is quantised, not the platform."""
    found = [fp8_parts(stack) for stack in stacks]
    out = moe_ffn(
        (rows.values, rows.scales),
        weights,
        experts,
        *((stack.values, stack.scales) for stack, _ in found),
        all_experts=all_experts,
        layer=found[0][1],
    )
    return out.astype(rows.dtype)


def _kernel_unsupported(dtype: jnp.dtype, stacks: list[Stack | BlockScaled | LayerOf]) -> str | None:
    """Why the GPU kernels cannot serve these experts with unquantised activations; None if they can."""
    gate, _ = parts(stacks[0])
    if isinstance(gate, SeparateStack):
        return "the kernels take the experts as stacks, but these are split for a CPU"
    if dtype != jnp.bfloat16:
        return f"the kernels take bfloat16 tokens, not {dtype}"
    if not isinstance(gate, jax.Array) or gate.dtype != dtype:
        return "the kernels take experts in bfloat16, or in FP8 with quantised activations"
    if any(size % FP8_BLOCK for size in gate.shape[-2:]):
        return f"the kernels take sizes that are multiples of {FP8_BLOCK}, not {gate.shape[-2:]}"
    return None
