"""Image features go to the places they are given, and no others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from step3_jax.layers.embed import merge_image_features


def test_features_overwrite_their_rows_alone():
    embeddings = jnp.zeros((2, 3, 2))
    features = jnp.asarray([[1.0, 1.0], [2.0, 2.0]])
    found = merge_image_features(embeddings, features, jnp.asarray([[-1, 1, -1], [0, -1, 1]]))
    np.testing.assert_array_equal(found[..., 0], [[0, 2, 0], [1, 0, 2]])


def test_features_take_the_dtype_of_the_embeddings():
    embeddings = jnp.zeros((1, 1, 2), jnp.bfloat16)
    assert merge_image_features(embeddings, jnp.ones((1, 2)), jnp.zeros((1, 1), jnp.int32)).dtype == jnp.bfloat16
