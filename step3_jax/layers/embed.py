"""Token embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.stored import take_rows


class Embedding(nnx.Module):
    """A table with one row for each id of the vocabulary; no scaling.

    Attributes:
      cpu_kernels: The kernels that the following layers use, if `model.cpu` has set them: rows are then widened to float32.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        table = jax.random.normal(rngs.params(), (vocab_size, hidden_size), jnp.float32) * 0.02
        self.weight = nnx.Param(table.astype(dtype))
        self.cpu_kernels: Kernels | None = None

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.weight[...]
        if self.cpu_kernels is not None:
            return take_rows(self.cpu_kernels, table, ids)
        if table.dtype != jnp.bfloat16:
            return jnp.take(table, ids, axis=0, mode="clip")
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
        return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), table.dtype)


def merge_image_features(
    embeddings: Float[Array, "B T D"], features: Float[Array, "M D"], rows: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Overwrites the embeddings of image places.

    Args:
      embeddings: Token embeddings.
      features: Concatenated features of all images.
      rows: Row of `features` for each token; -1 where the token is not an image place.
    """
    picked = jnp.take(features, jnp.maximum(rows, 0), axis=0, mode="clip").astype(embeddings.dtype)
    return jnp.where((rows >= 0)[..., None], picked, embeddings)
