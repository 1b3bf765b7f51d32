"""The whole model: what it refuses, and that it compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.checkpoint.load import load_model
from step3_jax.model.step3 import check_places


@pytest.fixture(scope="module")
def model(goldens):
    return load_model(goldens / "tiny_vl")


@pytest.fixture(scope="module")
def text_model(goldens):
    return load_model(goldens / "tiny_text")


def pictures(count, size=112):
    return np.zeros((count, 3, size, size), np.float32)


def ids(num_places, model):
    return jnp.asarray([[1] + [model.config.image_token_id] * num_places + [3]])


def test_text_only_model_refuses_pictures(text_model):
    with pytest.raises(ValueError, match="text-only model"):
        text_model(ids(4, text_model), None, pictures(1))
    with pytest.raises(ValueError, match="text-only model"):
        text_model.encode_images(jnp.asarray(pictures(1)))


@pytest.mark.parametrize(
    ("windows", "num_patches"), [(None, [1]), (pictures(2, 70), [1]), (pictures(1, 70), None), (None, [0, 0])]
)
def test_windows_must_match_num_patches(model, windows, num_patches):
    with pytest.raises(ValueError, match="they must sum to the windows"):
        model(ids(4, model), None, pictures(1), windows, num_patches)


def test_windows_need_whole_pictures(model):
    with pytest.raises(ValueError, match="need pixel_values"):
        model(ids(1, model), None, None, pictures(1, 70), [1])


@pytest.mark.parametrize("num_places", [0, 3, 5])
def test_image_places_must_match_the_features(num_places):
    with pytest.raises(ValueError, match=f"the prompt has {num_places} image places, but the images give 4"):
        check_places(num_places, 4)


def test_call_counts_the_image_places(model, monkeypatch):
    # The tower is not what is tested: features of the right shape stand in for it.
    monkeypatch.setattr(type(model), "encode_images", lambda self, pixels: jnp.zeros((len(pixels), 4, 64)))
    with pytest.raises(ValueError, match="the prompt has 3 image places"):
        model(ids(3, model), None, pictures(1))


def test_pictures_must_be_squares_of_whole_patches(model):
    with pytest.raises(ValueError, match="squares of a multiple of 14"):
        model.vision.embeddings(jnp.zeros((1, 3, 100, 100)))


def test_ids_must_have_a_batch(text_model):
    with pytest.raises(Exception, match=r"input_ids"):
        text_model(jnp.zeros(3, jnp.int32))


def test_compiled_call_takes_a_batch_and_depends_on_no_later_token(text_model):
    graphdef, state = nnx.split(text_model)
    call = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    batch = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    logits = call(state, batch)
    changed = call(state, batch.at[:, 3].set(9))
    assert logits.shape == (2, 4, 192)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits[:, :3], changed[:, :3])
    assert np.abs(np.asarray(logits[:, 3] - changed[:, 3])).max() > 1e-3
    swapped = call(state, batch[::-1])
    np.testing.assert_allclose(swapped[::-1], logits, atol=1e-5)
