"""Muon and the optimiser that is made of it and Adam."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.train.optimizer import make_optimizer, orthogonalise, scale_by_muon


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 12, 12)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 7
    # A square random matrix has singular values near zero, which five iterations cannot lift.
    matrices += 14 * np.eye(*shape[1:], dtype=np.float32)
    done = np.asarray(orthogonalise(jnp.asarray(matrices)))
    values = np.linalg.svd(done, compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalise_keeps_the_directions() -> None:
    matrix = np.random.default_rng(1).normal(size=(6, 18)).astype(np.float32)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    done = np.asarray(orthogonalise(jnp.asarray(matrix[None])))[0]
    agreement = np.sum(done * (left @ right)) / (np.linalg.norm(done) * np.linalg.norm(left @ right))
    assert agreement > 0.97


def test_matrices_of_one_shape_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(2)
    gradients = {
        "a": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "experts": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    }
    muon = scale_by_muon()

    @jax.jit
    def update(tree):
        return muon.update(tree, muon.init(tree))[0]

    together = update(gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(together[name], update({name: gradient})[name], atol=1e-5)
    alone = update({"a": gradients["experts"][1]})
    np.testing.assert_allclose(together["experts"][1], alone["a"], atol=1e-5)


def test_muon_update_has_the_root_mean_square_of_adam() -> None:
    gradient = {"x": jnp.asarray(np.random.default_rng(3).normal(size=(16, 48)), jnp.float32)}
    muon = scale_by_muon()
    update, _ = muon.update(gradient, muon.init(gradient))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(update["x"] ** 2)), 0.2, rtol=0.25)


def test_updates_of_unit_rate_lead_downhill() -> None:
    rng = np.random.default_rng(4)
    goal = {"matrix": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), "bias": jnp.asarray([1.0, -2.0, 0.5])}
    params = jax.tree.map(jnp.zeros_like, goal)
    optimizer = make_optimizer(params, lambda path, leaf: leaf.ndim == 2, weight_decay=0.0, clip_norm=1e9)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, rate):
        loss, gradients = jax.value_and_grad(
            lambda tree: sum(jnp.sum((tree[name] - goal[name]) ** 2) for name in goal)
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda param, update: param - rate * update, params, updates), state, loss

    losses = []
    for number in range(150):
        params, state, loss = step(params, state, 0.1 * (1 - number / 150))
        losses.append(float(loss))
    assert losses[1] < losses[0]
    assert losses[-1] < 0.05 * losses[0]


def test_weight_decay_spares_vectors() -> None:
    params = {"matrix": jnp.ones((4, 4)), "norm": jnp.ones((4,))}
    optimizer = make_optimizer(params, lambda path, leaf: leaf.ndim == 2, weight_decay=0.5, clip_norm=1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], 0.5, atol=1e-5)
    np.testing.assert_allclose(updates["norm"], 0.0, atol=1e-7)


def test_gradients_are_clipped_together() -> None:
    params = {"norm": jnp.ones((4,))}
    optimizer = make_optimizer(params, lambda path, leaf: False, weight_decay=0.0, clip_norm=1.0)
    huge, state = optimizer.update({"norm": jnp.full((4,), 1e6)}, optimizer.init(params), params)
    # Adam's first update is the sign; its second moment shows what came in.
    second_moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    assert all(float(jnp.max(leaf)) <= 1.0 for leaf in second_moments)
    np.testing.assert_allclose(huge["norm"], 1.0, rtol=1e-3)


def test_fixed_leaves_neither_move_nor_decay() -> None:
    params = {"moving": jnp.ones((4, 4)), "fixed": jnp.ones((4, 4))}
    optimizer = make_optimizer(
        params,
        lambda path, leaf: True,
        weight_decay=0.1,
        clip_norm=1.0,
        is_fixed=lambda path: path[0].key == "fixed",
    )
    updates, _ = optimizer.update(jax.tree.map(lambda leaf: 3 * leaf, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["fixed"], 0)
    assert np.abs(updates["moving"]).min() > 0
