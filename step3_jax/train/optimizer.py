"""The optimiser: Muon for matrices, AdamW for the rest.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by Newton-Schulz
iterations. Here matrices of one shape are stacked and orthogonalised together: unrolled over some sixty matrices the
iterations take minutes to compile, stacked they take seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

# Quintic coefficients and the update scale that matches AdamW's root mean square (Liu et al., arXiv 2502.16982).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_MATCHED_RMS = 0.2


class MuonState(NamedTuple):
    """Momentum of each matrix."""

    momentum: PyTree


def orthogonalise(matrices: Float[Array, "stack rows columns"]) -> Float[Array, "stack rows columns"]:
    """U V^T of each matrix's singular value decomposition, by Newton-Schulz iterations (approximate)."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if is_tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.swapaxes(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.swapaxes(1, 2) if is_tall else x


def scale_by_muon(beta: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled to the root mean square of an Adam update.

    Leaves have two axes or more; leading axes (experts) are separate matrices.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: MuonState, params: PyTree | None = None) -> tuple[PyTree, MuonState]:
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates)
        leaves, tree = jax.tree.flatten(nesterov)
        groups = defaultdict(list)
        for index, leaf in enumerate(leaves):
            groups[leaf.shape[-2:]].append(index)
        for shape, members in groups.items():
            stacks = [leaves[index].reshape(-1, *shape) for index in members]
            done = orthogonalise(jnp.concatenate(stacks)) * (_MATCHED_RMS * max(shape) ** 0.5)
            starts = [sum(len(stack) for stack in stacks[:i]) for i in range(len(stacks))]
            for index, stack, start in zip(members, stacks, starts, strict=True):
                leaves[index] = done[start : start + len(stack)].reshape(leaves[index].shape)
        return jax.tree.unflatten(tree, leaves), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    params: PyTree,
    is_matrix: Callable[[tuple[object, ...], Array], bool],
    *,
    weight_decay: float,
    clip_norm: float,
    is_fixed: Callable[[tuple[object, ...]], bool] | None = None,
) -> optax.GradientTransformation:
    """Muon for the leaves that `is_matrix(path, leaf)` names, Adam for the others, decoupled weight decay for both.

    The leaves that `is_fixed(path)` names are left as they are. The updates have unit learning rate: the caller multiplies
    by minus the rate of the step.
    """

    def label(path: tuple[object, ...], leaf: Array) -> str:
        if is_fixed is not None and is_fixed(path):
            return "fixed"
        return "muon" if is_matrix(path, leaf) else "adam"

    labels = jax.tree_util.tree_map_with_path(label, params)
    decays = jax.tree.map(lambda leaf, name: leaf.ndim >= 2 and name != "fixed", params, labels)
    rules = {
        "muon": scale_by_muon(),
        "adam": optax.scale_by_adam(b1=0.9, b2=0.95),
        "fixed": optax.set_to_zero(),
    }
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.partition(rules, labels),
        optax.add_decayed_weights(weight_decay, mask=decays),
    )
