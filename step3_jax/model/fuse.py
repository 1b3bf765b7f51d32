"""The layers in the form that is fast on GPUs: products of the same input joined, and activations quantised in between.

`fuse` joins the first products of attention (q, k and v) and of a feed-forward network (gate and up), so that one product
reads their weights in one stream. `separate` is its inverse, for saving and for training. `set_quantised` says whether
activations are quantised before products with weights in FP8; that is a property of the model and not of the platform
that it runs on, so that references on a CPU compute what the kernels do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from step3_jax.layers.attention import MFA
from step3_jax.layers.linear import Linear
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import Experts
from step3_jax.model.text import DecoderLayer, FfnBlock
from step3_jax.quant import BlockScaled

# An array, or the shape of one.
Leaf = Shaped[Array, "..."] | jax.ShapeDtypeStruct
Weight = Leaf | BlockScaled
# For each kind of module: the products that are joined, in this order, and the name of the result.
JOINED = ((MFA, ("q_proj", "k_proj", "v_proj"), "qkv_down_proj"), (SwiGLU, ("gate_proj", "up_proj"), "gate_up_proj"))


def fuse(model: nnx.Module) -> None:
    """Joins products of the same input in all layers of `model`, wherever their weights are of the same kind.

    If they belong on several devices they must be there already: each device joins its own parts.
    Layers may be stacked or not, arrays may be shapes. A weight in FP8 is joined if each device's part of it is whole
    blocks. While a weight is being joined there are two copies of it.
    """
    for module, names, joined in _find(model):
        parts = [getattr(module, name) for name in names]
        if any(part is None or part.bias is not None for part in parts):
            continue
        weights = [part.weight.get_value() for part in parts]
        if not _can_join(weights):
            continue
        made = _like(parts[0], _join(weights))
        for name in names:
            setattr(module, name, None)
        setattr(module, joined, made)


def separate(model: nnx.Module) -> None:
    """Undoes `fuse`: the products of `model` are separate again, with their own weights."""
    for module, names, joined in _find(model):
        found = getattr(module, joined)
        if found is None:
            continue
        weight = found.weight.get_value()
        for name, part in zip(names, _cut(weight, _sizes(module, weight)), strict=True):
            setattr(module, name, _like(found, part))
        setattr(module, joined, None)


def set_quantised(model: nnx.Module, *, wanted: bool, has_plain_ffn: bool = False) -> None:
    """Sets whether activations are quantised before products with weights in FP8.

    They are quantised to e4m3 with a scale for each 128 columns of a row, and multiplied in FP8, on any device: by kernels
    or by their references. Otherwise weights in FP8 are dequantised. Weights in other forms are multiplied as usual.

    Args:
      model: Changed in place.
      wanted: Whether to quantise them.
      has_plain_ffn: Whether those of the FFN halves are not quantised all the same.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Experts):
            module.quantises = wanted
    for _, block in nnx.iter_modules(model):
        for _, module in nnx.iter_modules(block) if has_plain_ffn and isinstance(block, FfnBlock) else ():
            if isinstance(module, Linear | Experts):
                module.quantises = False
    for _, module in nnx.iter_modules(model):
        # The products after a norm decide the form of its rows.
        if isinstance(module, MFA):
            module.inter_norm.quantises = module.wq.takes_rows
        elif isinstance(module, DecoderLayer):
            attention, ffn = module.attention, module.ffn
            attention.input_layernorm.quantises = attention.self_attn.takes_rows
            behind = [part for part in (ffn.mlp, ffn.moe, ffn.share_expert) if part is not None]
            attention.post_attention_layernorm.quantises = all(part.takes_rows for part in behind)
            # The router is never quantised.
            attention.post_attention_layernorm.keeps_plain = True


def is_quantised(model: nnx.Module) -> bool:
    """Whether activations are quantised before products with weights in FP8, as `set_quantised` has it."""
    return any(isinstance(module, Linear | Experts) and module.takes_rows for _, module in nnx.iter_modules(model))


def _find(model: nnx.Module) -> Iterator[tuple[nnx.Module, tuple[str, ...], str]]:
    """Modules with products to join, the names of these, and the name of the result."""
    for _, module in list(nnx.iter_modules(model)):
        for kind, names, joined in JOINED:
            if isinstance(module, kind):
                yield module, names, joined


def _like(linear: Linear, weight: Weight) -> Linear:
    """A projection like `linear` with another weight."""
    made = nnx.merge(*nnx.split(linear))
    made.weight = nnx.Param(weight)
    return made


def _can_join(weights: Sequence[Weight]) -> bool:
    """Whether weights are of the same kind, and each device's parts of them can be concatenated by rows."""
    first = weights[0]
    if isinstance(first, BlockScaled):
        is_one_kind = all(isinstance(weight, BlockScaled) and weight.block == first.block for weight in weights)
        return is_one_kind and all(_local_rows(weight.values) % first.block[0] == 0 for weight in weights)
    return all(_is_array(weight) and weight.dtype == first.dtype for weight in weights)


def _is_array(weight: Weight) -> bool:
    return isinstance(weight, jax.Array | jax.ShapeDtypeStruct)


def _join(weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    if isinstance(first, BlockScaled):
        values, scales = (_stack_rows([getattr(weight, name) for weight in weights]) for name in ("values", "scales"))
        return BlockScaled(values, scales, first.block)
    return _stack_rows(weights)


def _cut(weight: Weight, sizes: Sequence[int]) -> list[Weight]:
    """The inverse of `_join`; `sizes` are rows of one device."""
    if not isinstance(weight, BlockScaled):
        return [*_split_rows(weight, sizes)]
    values = _split_rows(weight.values, sizes)
    scales = _split_rows(weight.scales, [size // weight.block[0] for size in sizes])
    return [BlockScaled(*pair, weight.block) for pair in zip(values, scales, strict=True)]


def _sizes(module: nnx.Module, weight: Weight) -> list[int]:
    """Rows of each part of a joined weight that one device has."""
    rows = _local_rows(weight.values if isinstance(weight, BlockScaled) else weight)
    if isinstance(module, MFA):
        return [rows - 2 * module.head_dim, module.head_dim, module.head_dim]
    return [rows // 2, rows // 2]


def _stack_rows(arrays: Sequence[Leaf]) -> Leaf:
    """Concatenates arrays by rows (next to last axis), on each device the parts that it has."""
    first = arrays[0]
    shape = (*first.shape[:-2], sum(array.shape[-2] for array in arrays), first.shape[-1])
    return _on_each_device(arrays, shape, lambda *parts: jnp.concatenate(parts, axis=-2))


def _split_rows(array: Leaf, sizes: Sequence[int]) -> list[Leaf]:
    """The inverse of `_stack_rows`."""
    num_parts, start, out = array.shape[-2] // _local_rows(array), 0, []
    for size in sizes:
        shape = (*array.shape[:-2], num_parts * size, array.shape[-1])
        cut = functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=start + size, axis=-2)
        out.append(_on_each_device([array], shape, cut))
        start += size
    return out


def _on_each_device(arrays: Sequence[Leaf], shape: tuple[int, ...], run: Callable[..., jax.Array]) -> Leaf:
    """Applies `run` to each device's parts of `arrays`, which are sharded alike; one array of `shape`, sharded the same."""
    first = arrays[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)
    # Device by device, not as one program for all: this process may have none of them.
    found = [{shard.device: shard.data for shard in array.addressable_shards} for array in arrays]
    made = [run(*(parts[device] for parts in found)) for device in found[0]]
    return jax.make_array_from_single_device_arrays(shape, first.sharding, made, dtype=first.dtype)


def _local_rows(array: Leaf) -> int:
    """Rows (next to last axis) that one device has."""
    sharding = getattr(array, "sharding", None)
    return (array.shape if sharding is None else sharding.shard_shape(array.shape))[-2]
