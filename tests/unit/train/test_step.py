"""One training step: the loss over packed rows, and what training sets in the model."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from step3_jax.config import ModelConfig
from step3_jax.model.step3 import Step3
from step3_jax.text.images import ImageSettings, process
from step3_jax.train.data import Example, TokenRows, pack_prefixed, pack_rows
from step3_jax.train.optimizer import make_optimizer
from step3_jax.train.step import (
    Guide,
    RowLoss,
    TrainState,
    apply_gradients,
    is_block_matrix,
    normalise_pixels,
    packed_context,
    prepare_for_training,
    previous_places,
    row_loss,
    set_capacity,
    split_model,
)

LENGTH = 24


def _examples(rng: np.random.Generator, lengths: tuple[int, ...]) -> list[Example]:
    return [
        Example(rng.integers(2, 38, length).tolist(), rng.uniform(0, 1, length).round(2).tolist()) for length in lengths
    ]


def _rows(examples: list[Example]) -> TokenRows:
    """One row that holds all of the examples once; every test has this shape, which compiles once."""
    padding = Example([0] * LENGTH, [0.0] * LENGTH)
    return pack_rows(iter([*examples, padding]), num_rows=1, length=LENGTH)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_scored")
def _run(graphdef, params, rows, features, *, num_scored):
    return row_loss(nnx.merge(graphdef, params), rows, features, num_scored=num_scored)


def _loss(model: Step3, rows: TokenRows, features: jax.Array | None = None, num_scored: int | None = None) -> RowLoss:
    return _run(*split_model(model), rows, features, num_scored=num_scored)


def test_loss_is_that_of_the_model_used_for_inference(text_model: Step3) -> None:
    example = _examples(np.random.default_rng(0), (12,))[0]
    loss = _loss(text_model, _rows([example]))
    graphdef, params = split_model(text_model)
    logits = jax.jit(lambda ids: nnx.merge(graphdef, params)(ids))(jnp.asarray([example.ids]))
    logits = np.asarray(logits, np.float64)[0, :-1]
    chosen = logits[np.arange(11), example.ids[1:]]
    nats = np.log(np.exp(logits).sum(axis=1)) - chosen
    np.testing.assert_allclose(loss.total, np.sum(nats * example.weights[1:]), rtol=1e-4)
    np.testing.assert_allclose(loss.weight, sum(example.weights[1:]), rtol=1e-5)
    right = (logits.argmax(axis=1) == example.ids[1:]) * example.weights[1:]
    np.testing.assert_allclose(loss.correct, right.sum(), atol=1e-5)


def test_packed_sequences_cost_what_they_cost_alone(text_model: Step3) -> None:
    examples = _examples(np.random.default_rng(1), (5, 9, 7))
    together = _loss(text_model, _rows(examples))
    alone = [_loss(text_model, _rows([example])) for example in examples]
    np.testing.assert_allclose(together.total, sum(loss.total for loss in alone), rtol=1e-5)
    np.testing.assert_allclose(together.weight, sum(loss.weight for loss in alone), rtol=1e-6)


def test_sequences_with_a_common_prefix_cost_what_they_cost_with_it_alone(text_model: Step3) -> None:
    prefix, *examples = _examples(np.random.default_rng(7), (8, 5, 9))
    together = _loss(text_model, pack_prefixed([(prefix.ids, examples)], length=LENGTH))
    whole = [
        Example([*prefix.ids, *example.ids], [0.0] * (len(prefix.ids) + 1) + example.weights[1:])
        for example in examples
    ]
    alone = [_loss(text_model, _rows([example])) for example in whole]
    np.testing.assert_allclose(together.total, sum(loss.total for loss in alone), rtol=1e-5)
    np.testing.assert_allclose(together.weight, sum(loss.weight for loss in alone), rtol=1e-6)


def test_scoring_only_weighted_places_changes_nothing(text_model: Step3) -> None:
    rng = np.random.default_rng(2)
    rows = _rows([Example(rng.integers(2, 38, 10).tolist(), [0.0] * 8 + [1.0] * 2) for _ in range(2)])
    whole, picked = _loss(text_model, rows), _loss(text_model, rows, num_scored=5)
    assert float(whole.weight) == 4
    for name in ("total", "weight", "correct"):
        np.testing.assert_allclose(getattr(picked, name), getattr(whole, name), rtol=1e-5)


def test_image_features_enter_where_they_are_pointed_at(text_model: Step3) -> None:
    rng = np.random.default_rng(3)
    example = Example([2, 39, 39, 5, 6, 7], [0.0] * 3 + [1.0] * 3)
    rows = pack_rows(itertools.repeat(example), num_rows=1, length=LENGTH, image_id=39, rows_each=2)
    features = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    first = _loss(text_model, rows, features).total
    other_picture = _loss(text_model, rows, features.at[2:].add(1.0)).total
    own_picture = _loss(text_model, rows, features.at[1].add(1.0)).total
    np.testing.assert_allclose(other_picture, first, rtol=1e-6)
    assert abs(float(own_picture - first)) > 1e-4


def test_enough_capacity_drops_nothing(text_model: Step3) -> None:
    rows = _rows(_examples(np.random.default_rng(4), (20,)))
    exact = _loss(text_model, rows).total
    set_capacity(text_model, 4.0)
    np.testing.assert_allclose(_loss(text_model, rows).total, exact, rtol=1e-5)
    set_capacity(text_model, 0.3)
    assert abs(float(_loss(text_model, rows).total - exact)) > 1e-4


def test_gradient_of_the_loss_is_finite_and_reaches_every_parameter(text_model: Step3) -> None:
    set_capacity(text_model, 4.0)
    graphdef, params = split_model(text_model)
    rows = jax.tree.map(jnp.asarray, _rows(_examples(np.random.default_rng(5), (LENGTH,))))
    gradients = jax.jit(jax.grad(lambda tree: row_loss(nnx.merge(graphdef, tree), rows).total))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_the_tower_sees_the_same_pixels_in_training_as_at_inference() -> None:
    settings = ImageSettings(image_size=64, window_size=48, max_side=96)
    pixels = np.random.default_rng(6).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    expected = process(Image.fromarray(pixels), settings).pixel_values
    got = normalise_pixels(jnp.asarray(pixels)[None], mean=settings.image_mean, std=settings.image_std)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_muon_takes_the_layers_matrices_and_nothing_else() -> None:
    model = nnx.eval_shape(lambda: Step3(ModelConfig.preset("step3-tiny"), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    _, params = split_model(model)
    is_matrix = {
        jax.tree_util.keystr(path): is_block_matrix(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path({"model": params})
    }
    for outside in ("embed_tokens", "lm_head", "router", "vit_downsampler", "embeddings", "norm"):
        assert not any(chosen for path, chosen in is_matrix.items() if outside in path), outside
    for inside in ("wq", "gate_proj", "down_proj", "fc1"):
        assert any(chosen for path, chosen in is_matrix.items() if inside in path), inside


def test_training_starts_with_small_tower_branches() -> None:
    model = nnx.eval_shape(lambda: Step3(ModelConfig.preset("step3-tiny"), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    prepare_for_training(model, capacity_factor=1.5, branch_gain=0.25)
    for layer in model.vision.layers:
        for norm in (layer.layer_norm1, layer.layer_norm2):
            np.testing.assert_array_equal(norm.weight[...], 0.25)
    factors = [layer.ffn.moe.capacity_factor for layer in model.text.layers if layer.ffn.moe is not None]
    assert factors == [1.5, 1.5]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_an_update_goes_against_the_gradient_at_the_given_rate(rate: float) -> None:
    params = {"bias": jnp.zeros((3,))}
    optimizer = make_optimizer(params, lambda path, leaf: False, weight_decay=0.0, clip_norm=1e9)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    state = apply_gradients(state, {"bias": jnp.asarray([1.0, -2.0, 3.0])}, optimizer, jnp.float32(rate))
    np.testing.assert_allclose(state.params["bias"], [-rate, rate, -rate], rtol=1e-3)
    assert int(state.step) == 1


def test_a_guide_measures_attention_and_changes_nothing_else(text_model: Step3) -> None:
    rows = _rows(_examples(np.random.default_rng(8), (6,)))
    told = jnp.full((1, LENGTH), -1).at[0, 4].set(2)

    @jax.jit
    def run(params, rows, sources):
        model = nnx.merge(graphdef, params)
        guided = row_loss(model, rows, guide=Guide(sources, heads=((0, 1),), previous=()))
        layer = model.text.layers[0]
        hidden = layer.attention.input_layernorm(model.text.embed_tokens(rows.ids))
        scores = layer.attention.self_attn.scores(hidden, packed_context(model.text, rows), [1])
        return guided, row_loss(model, rows), jax.nn.softmax(scores[0, 4, 0])

    graphdef, params = split_model(text_model)
    guided, plain, attention = run(params, rows, told)
    np.testing.assert_allclose(guided.guide, -np.log(attention[2]), rtol=1e-5)
    np.testing.assert_allclose(np.sum(attention[:5]), 1, rtol=1e-5)  # a token sees itself and those before
    assert float(plain.guide) == 0
    np.testing.assert_allclose(guided.total, plain.total, rtol=1e-6)


def test_the_token_before_is_never_that_of_another_sequence() -> None:
    rows = _rows(_examples(np.random.default_rng(9), (3, 2)))
    np.testing.assert_array_equal(previous_places(rows)[0, :6], [-1, 0, 1, -1, 3, -1])
