"""Routed experts sharded over devices: each has whole experts, or parts of their width, or both.

Tokens reach their experts in one of two ways. Gathered: every device gets all tokens, adds up its experts'
outputs, and a reduce-scatter takes the sums back. All-to-all: a token goes once to each group of devices that has one of
its experts, and one sum comes back from each; a group takes a fixed number of tokens from each sender, and if a step has
more than that for some group, the whole step is gathered instead: no token is ever dropped.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from step3_jax.layers.collective import Group
from step3_jax.layers.moe import Experts
from step3_jax.layers.router import Routing
from step3_jax.layers.rows import Rows, as_plain

# Room for one sender's tokens for one group, relative to the expected number if all experts are equally likely.
CAPACITY_FACTOR = 2.0
CAPACITY_MULTIPLE = 8

Tokens = tuple[Float[Array, "M D"] | Rows, Float[Array, "M top_k"], Int[Array, "M top_k"]]


class ShardedExperts(nnx.Module):
    """The routed experts of one layer; `inner` holds this device's part of them."""

    def __init__(
        self,
        inner: Experts,
        everyone: Group,
        *,
        expert_axes: tuple[str, ...],
        width: Group,
        num_experts: int,
        use_all_to_all: bool,
    ) -> None:
        """Wraps a device's part.

        Args:
          inner: The part.
          everyone: All devices that the layer is sharded across.
          expert_axes: Mesh axes along which devices have different experts.
          width: Devices that have parts of the width of the same experts.
          num_experts: Experts of the layer.
          use_all_to_all: Whether to use the all-to-all; tokens must then be split over `everyone`.
        """
        self.inner = inner
        self.everyone = everyone
        self.width = width
        self.expert_axes = expert_axes
        self.num_experts = num_experts
        self.use_all_to_all = use_all_to_all

    def __call__(self, hidden: Float[Array, "N D"] | Rows, routing: Routing) -> Float[Array, "N D"]:
        """The layer's sum for this device's own tokens."""
        tokens = (hidden, routing.weights, routing.experts)
        if not self.use_all_to_all or not self.expert_axes:
            return self._gathered(*tokens)
        # An all-to-all leaves zeros in empty places, so rows are sent plain, and quantised where they arrive.
        tokens = (as_plain(hidden), routing.weights, routing.experts)
        hidden, weights, experts = gather_tokens(self.width, *tokens)
        num_groups = jax.lax.axis_size(self.expert_axes)
        room = capacity(hidden.shape[0], weights.shape[1], num_groups)
        per_group = self.num_experts // num_groups
        # [M, groups]: whether some expert of the group is among the token's.
        is_wanted = jnp.any(experts[:, :, None] // per_group == jnp.arange(num_groups), axis=1)
        if room == hidden.shape[0]:
            return self._exchanged(hidden, weights, experts, is_wanted, room)
        overflows = jnp.max(jnp.sum(is_wanted, axis=0)) > room
        # The same decision on all devices, as the two ways exchange differently.
        overflows = jax.lax.pmax(overflows.astype(jnp.int32), self.everyone.axes) > 0
        return jax.lax.cond(
            overflows,
            lambda: self._gathered(*tokens),
            lambda: self._exchanged(hidden, weights, experts, is_wanted, room),
        )

    def sum_part(
        self, hidden: Float[Array, "N D"] | Rows, weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]
    ) -> Float[Array, "N D"]:
        """The contribution of this device's part for any tokens; expert ids are global."""
        count = self.inner.gate_proj[...].shape[0]
        first = jax.lax.axis_index(self.expert_axes) * count if self.expert_axes else 0
        local = experts - first
        is_here = (local >= 0) & (local < count)
        # `count` stands for an expert outside this part.
        return self.inner(
            hidden, jnp.where(is_here, weights, 0), jnp.where(is_here, local, count), all_experts=self.num_experts
        )

    def _gathered(
        self, hidden: Float[Array, "N D"] | Rows, weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]
    ) -> Float[Array, "N D"]:
        return self.everyone.reduce(self.sum_part(*gather_tokens(self.everyone, hidden, weights, experts)))

    def _exchanged(
        self,
        hidden: Float[Array, "M D"],
        weights: Float[Array, "M top_k"],
        experts: Int[Array, "M top_k"],
        is_wanted: Bool[Array, "M groups"],
        room: int,
    ) -> Float[Array, "N D"]:
        """All-to-all of tokens that all devices of a width group have; each sends them along its own expert axes."""
        num_tokens, num_groups = is_wanted.shape
        places = jnp.where(is_wanted, jnp.cumsum(is_wanted, axis=0) - 1, room)
        numbers = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], places.shape)
        # Token of each place; empty places point past the last token.
        picked = jnp.full((num_groups, room), num_tokens, jnp.int32)
        picked = picked.at[jnp.arange(num_groups), places].set(numbers, mode="drop").reshape(-1)

        def send(rows: Array) -> Array:
            return jax.lax.all_to_all(rows, self.expert_axes, split_axis=0, concat_axis=0, tiled=True)

        packed = send(pack_choices(weights, experts).at[picked].get(mode="fill", fill_value=-1))
        arrived = send(hidden.at[picked].get(mode="fill", fill_value=0))
        sums = send(self.sum_part(arrived, *unpack_choices(packed)))
        total = jnp.zeros((num_tokens, hidden.shape[1]), jnp.float32)
        total = total.at[picked].add(sums.astype(jnp.float32), mode="drop")
        return self.width.reduce(total.astype(hidden.dtype))


def capacity(num_tokens: int, top_k: int, num_groups: int) -> int:
    """Tokens that a sender may have for one group: twice the expected number, at most all of them."""
    expected = num_tokens * (1 - (1 - 1 / num_groups) ** top_k)
    room = math.ceil(CAPACITY_FACTOR * expected / CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
    return min(room, num_tokens)


def gather_tokens(
    group: Group, hidden: Float[Array, "N D"] | Rows, weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]
) -> Tokens:
    """The tokens of all devices of a group, with their choices."""
    if not group.split:
        return hidden, weights, experts
    return group.gather_rows(hidden), *unpack_choices(group.gather(pack_choices(weights, experts)))


def pack_choices(weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]) -> Int[Array, "N both"]:
    """Weights and ids in one array, for one exchange instead of two."""
    bits = jax.lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([experts.astype(jnp.int32), bits], axis=1)


def unpack_choices(packed: Int[Array, "N both"]) -> tuple[Float[Array, "N top_k"], Int[Array, "N top_k"]]:
    """The inverse of `pack_choices`."""
    experts, bits = jnp.split(packed, 2, axis=1)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), experts
