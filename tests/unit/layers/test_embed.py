"""Image features go to the places they are given, and no others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.layers.embed import Embedding, merge_image_features


def test_features_overwrite_their_rows_alone():
    embeddings = jnp.zeros((2, 3, 2))
    features = jnp.asarray([[1.0, 1.0], [2.0, 2.0]])
    found = merge_image_features(embeddings, features, jnp.asarray([[-1, 1, -1], [0, -1, 1]]))
    np.testing.assert_array_equal(found[..., 0], [[0, 2, 0], [1, 0, 2]])


def test_features_take_the_dtype_of_the_embeddings():
    embeddings = jnp.zeros((1, 1, 2), jnp.bfloat16)
    assert merge_image_features(embeddings, jnp.ones((1, 2)), jnp.zeros((1, 1), jnp.int32)).dtype == jnp.bfloat16


def test_a_loop_with_the_cpu_kernels_copies_no_table():
    """A decode call would copy 1.8 GB of Step3's embedding, and take five times as long for one token."""
    kernels = find_kernels()
    if not isinstance(kernels, Kernels):
        pytest.skip(kernels.reason)
    embedding = Embedding(4096, 64, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    embedding.cpu_kernels = kernels

    graph, weights = nnx.split(embedding)

    def run(weights, ids):
        embed = nnx.merge(graph, weights)
        return jax.lax.fori_loop(0, 3, lambda _, ids: ids + embed(ids).sum(-1).astype(jnp.int32), ids)

    compiled = jax.jit(run).lower(weights, jnp.zeros((1, 8), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < embedding.weight[...].nbytes / 8
