"""The vision tower and the projector that turns its patches into decoder tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.mfa_prefill import dense_attention
from step3_jax.config import NUM_CLASS_TOKENS, VISION_NORM_EPS, ModelConfig, VisionConfig
from step3_jax.layers.linear import Linear, linear, normal
from step3_jax.layers.norm import LayerNorm


class PatchEmbedding(nnx.Module):
    """Patches as a convolution of stride = size, which is a matrix product; class token and positions added."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width, size, channels = config.hidden_size, config.patch_size, config.num_channels
        fan_in = channels * size * size
        self.weight = nnx.Param(normal(rngs, (width, channels, size, size), fan_in, dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.class_embedding = nnx.Param(normal(rngs, (1, width), width, dtype))
        self.position_embedding = nnx.Param(normal(rngs, (1 + config.grid**2, width), width, dtype))
        self.patch_size = size
        self.grid = config.grid

    def __call__(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B tokens width"]:
        """Tokens: the class token (position added) four times, then the patches row by row."""
        batch, channels, height, width = pixels.shape
        size, weight = self.patch_size, self.weight[...]
        if height != width or height % size:
            raise ValueError(f"images are {height} x {width}; squares of a multiple of {size} are needed")
        grid = height // size
        patches = pixels.astype(weight.dtype).reshape(batch, channels, grid, size, grid, size)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch * grid * grid, -1)
        tokens = patches @ weight.reshape(weight.shape[0], -1).T + self.bias[...]
        tokens = tokens.reshape(batch, grid * grid, -1)
        table = resize_positions(self.position_embedding[...], self.grid, grid)
        first = jnp.broadcast_to(self.class_embedding[...] + table[:1], (batch, NUM_CLASS_TOKENS, tokens.shape[-1]))
        return jnp.concatenate([first, tokens + table[1:]], axis=1)


def resize_positions(table: Float[Array, "rows width"], from_grid: int, to_grid: int) -> Float[Array, "new_rows width"]:
    """Resizes the patch rows of the position table, bicubic with antialias in float32; the class row is kept."""
    if from_grid == to_grid:
        return table
    width = table.shape[-1]
    squares = table[1:].astype(jnp.float32).reshape(from_grid, from_grid, width)
    squares = jax.image.resize(squares, (to_grid, to_grid, width), method="cubic", antialias=True)
    return jnp.concatenate([table[:1], squares.reshape(-1, width).astype(table.dtype)])


class VisionAttention(nnx.Module):
    """Full attention with biases; no mask, no rotary embedding.

    If sharded, it has some of the heads, which are then an axis of its arrays (`view_shape` in `step3_jax/sharding.py`).
    """

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.qkv_proj = Linear(width, 3 * width, use_bias=True, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(width, width, use_bias=True, dtype=dtype, rngs=rngs)
        self.head_dim = config.head_dim

    def __call__(self, hidden: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        batch, length, width = hidden.shape
        qkv = linear(hidden, self.qkv_proj.weight[...].reshape(-1, width))
        qkv += self.qkv_proj.bias[...].reshape(-1)  # type: ignore[index]
        qkv = qkv.reshape(batch, length, 3, -1, self.head_dim)
        out = dense_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.out_proj(out.reshape(batch, length, -1))


class VisionMLP(nnx.Module):
    """fc2(quick_gelu(fc1 x)), quick_gelu(x) = x * sigmoid(1.702 x)."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, use_bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        inner = self.fc1(hidden)
        return self.fc2(inner * jax.nn.sigmoid(1.702 * inner))


class VisionLayer(nnx.Module):
    """h + LN1(attention(h)), then h + LN2(mlp(h)): the norms come after each branch."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.self_attn = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=VISION_NORM_EPS, dtype=dtype)
        self.mlp = VisionMLP(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=VISION_NORM_EPS, dtype=dtype)

    def __call__(self, hidden: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        hidden = hidden + self.layer_norm1(self.self_attn(hidden))
        return hidden + self.layer_norm2(self.mlp(hidden))


class VisionTower(nnx.Module):
    """Patches to patch features, [B, 4 + grid^2, width]."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.embeddings = PatchEmbedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([VisionLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B tokens width"]:
        hidden = self.embeddings(pixels)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{index}"):
                hidden = layer(hidden)
        return hidden


class Convolution(nnx.Module):
    """A convolution with the checkpoint's weight layout [out, in, height, width]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int,
        padding: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(normal(rngs, (out_features, in_features, size, size), in_features * size * size, dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype))
        self.stride = stride
        self.padding = padding

    def __call__(self, image: Float[Array, "B height width features"]) -> Float[Array, "B height2 width2 features2"]:
        out = jax.lax.conv_general_dilated(
            image,
            self.weight[...],
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            preferred_element_type=jnp.float32,
        )
        return out.astype(image.dtype) + self.bias[...]


class Projector(nnx.Module):
    """Two strided convolutions without an activation in between, then a linear map to the decoder's width."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        if config.vision is None:
            raise ValueError("a text-only model has no projector")
        width, out = config.vision.hidden_size, config.vision.output_hidden_size
        stride = config.understand_projector_stride
        self.vit_downsampler = Convolution(width, out, 2, stride=stride, padding=0, dtype=dtype, rngs=rngs)
        self.vit_downsampler2 = Convolution(out, 2 * out, 3, stride=2, padding=1, dtype=dtype, rngs=rngs)
        self.vit_large_projector = Linear(
            2 * out, config.text.hidden_size, use_bias=config.projector_bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, hidden: Float[Array, "B tokens width"]) -> Float[Array, "B image_tokens D"]:
        """Drops the class tokens and projects; 2704 patches become 169 tokens, 1296 become 81."""
        batch, tokens, width = hidden.shape
        grid = round((tokens - NUM_CLASS_TOKENS) ** 0.5)
        image = hidden[:, NUM_CLASS_TOKENS:].reshape(batch, grid, grid, width)
        image = self.vit_downsampler2(self.vit_downsampler(image))
        return self.vit_large_projector(image.reshape(batch, -1, image.shape[-1]))
