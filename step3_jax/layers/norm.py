"""Normalisation: RMSNorm of the decoder, LayerNorm of the vision tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.norm_quantise.api import norm_quantise
from step3_jax.layers.rows import Rows
from step3_jax.stack import LayerOf, parts


class RMSNorm(nnx.Module):
    """w * cast(x / sqrt(mean(x^2) + eps)): statistics in float32, cast back before the multiplication.

    Attributes:
      quantises: Whether it returns quantised rows, for products that take them; see `model.fuse.set_quantised`.
      keeps_plain: Whether quantised rows also carry the plain ones.
    """

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps
        self.quantises = False
        self.keeps_plain = False

    def __call__(self, hidden: Float[Array, "*batch columns"]) -> Float[Array, "*batch D"] | Rows:
        """The norm of the first D columns of `hidden`, which may have more: other parts of a joined product."""
        weight, layer = parts(self.weight[...])
        size = weight.shape[-1]
        if not self.quantises:
            return rms_norm(hidden[..., :size], pick_row(self.weight[...]), eps=self.eps)
        flat = hidden.reshape(-1, hidden.shape[-1])
        values, scales, *plain = norm_quantise(
            flat, weight, layer=layer, eps=self.eps, scales_layout="columns", with_normed=self.keeps_plain
        )
        return Rows(values, scales, plain[0] if plain else None, hidden.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * w + b, statistics in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = hidden.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        out = centred * scale * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return out.astype(hidden.dtype)


def rms_norm(hidden: Float[Array, "*batch D"], weight: Float[Array, " D"], *, eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation; `weight` multiplies plainly (not 1 + w)."""
    wide = hidden.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(hidden.dtype) * weight


def pick_row(weight: Float[Array, " D"] | LayerOf) -> Float[Array, " D"]:
    """One layer's weight of a norm.

    From a stack it is gathered in pieces: a plain slice would be a launch whose address the host recomputes in each
    layer.
    """
    if not isinstance(weight, LayerOf):
        return weight
    stored, layer = weight.stack, weight.index
    size = stored.shape[1]
    piece = next(width for width in (128, 64, 32, 16, 8, 4, 2, 1) if size % width == 0)
    return pick_rows(stored.reshape(-1, size // piece, piece), layer).reshape(size)


def pick_rows(stack: Float[Array, "L R D"], layer: Int[Array, ""]) -> Float[Array, "R D"]:
    """One layer of a stack, gathered row by row; see `pick_row`."""
    num_rows = stack.shape[1]
    places = layer * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.take(stack.reshape(-1, stack.shape[2]), places, axis=0, mode="clip")
