"""Layers whose weights are sharded over devices: the same call on each device's own tokens, with exchanges inside.

They run inside `jax.shard_map` with all axes of the mesh manual, and wrap a layer that holds this device's part of the
weights. Tokens are the first axis of every array here, and a "group" is the devices that a weight is sharded across.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from step3_jax.layers.embed import Embedding
from step3_jax.layers.linear import Linear, linear
from step3_jax.layers.rows import Rows, map_tokens


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that a weight is sharded across, as axes of the mesh.

    Attributes:
      split: Axes along which each device has its own tokens.
      copies: Axes along which all devices have the same tokens.
    """

    split: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """All of its axes."""
        return self.split + self.copies

    def gather_rows(self, hidden: Float[Array, "N D"] | Rows) -> Float[Array, "M D"] | Rows:
        """The tokens of all devices of the group; quantised rows are gathered as bytes."""
        if not self.split or not isinstance(hidden, Rows):
            return hidden if isinstance(hidden, Rows) else self.gather(hidden)
        return map_tokens(hidden, self.gather)

    def gather(self, rows: Num[Array, "N *rest"]) -> Num[Array, "M *rest"]:
        """The tokens of all devices of the group."""
        return jax.lax.all_gather(rows, self.split, axis=0, tiled=True) if self.split else rows

    def reduce(self, parts: Float[Array, "M D"]) -> Float[Array, "N D"]:
        """The sum over the group for each device's own tokens; the inverse of `gather` for partial sums."""
        if self.split:
            parts = jax.lax.psum_scatter(parts, self.split, scatter_dimension=0, tiled=True)
        return jax.lax.psum(parts, self.copies) if self.copies else parts

    def join_columns(self, part: Float[Array, "M part"]) -> Float[Array, "N whole"]:
        """All columns of a device's own tokens, where each device has computed some columns for all tokens."""
        if self.split:
            part = jax.lax.all_to_all(part, self.split, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_gather(part, self.copies, axis=1, tiled=True) if self.copies else part

    def split_columns(self, whole: Float[Array, "N whole"]) -> Float[Array, "M part"]:
        """This device's columns of all tokens, where each device has all columns of its own tokens."""
        if not self.split:
            return whole
        return jax.lax.all_to_all(whole, self.split, split_axis=1, concat_axis=0, tiled=True)


class ShardedEmbedding(nnx.Module):
    """An embedding table sharded by columns."""

    def __init__(self, inner: Embedding, group: Group) -> None:
        self.inner = inner
        self.group = group

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        part = self.inner(self.group.gather(ids.reshape(-1))[None])[0]
        return self.group.join_columns(part).reshape(*ids.shape, -1)


class ShardedHead(nnx.Module):
    """The head, sharded by rows; `vocab_size` rows in all are tokens, the rest is padding."""

    def __init__(self, inner: Linear, group: Group, vocab_size: int) -> None:
        self.inner = inner
        self.group = group
        self.vocab_size = vocab_size

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.group.join_columns(self.inner(self.group.gather(flat)))
        return logits[:, : self.vocab_size].reshape(*hidden.shape[:-1], -1)


class ShardedOutput(nnx.Module):
    """The o-projection, sharded by columns.

    With tensor parallel attention a device has computed just the values of its columns. Otherwise it has all values of its
    own tokens, and the group first exchanges tokens for columns: fewer bytes than all values of all tokens.
    """

    def __init__(self, inner: Linear, group: Group) -> None:
        self.inner = inner
        self.group = group

    @property
    def takes_rows(self) -> bool:
        """Whether the input may be quantised rows; to exchange columns they must be plain."""
        return self.inner.takes_rows and not self.group.split

    def __call__(self, heads: Float[Array, "B T Q"] | Rows) -> Float[Array, "*batch D"]:
        if isinstance(heads, Rows):
            return self.group.reduce(self.inner(heads))
        part = self.group.split_columns(heads.reshape(-1, heads.shape[-1]))
        return self.group.reduce(self.inner(part)).reshape(*heads.shape[:2], -1)


class SummedLinear(nnx.Module):
    """A projection sharded by columns, where each device has just its columns of the same tokens.

    The columns may be several axes. The bias, which every device has, is added once, to the sum.
    """

    def __init__(self, inner: Linear, group: Group) -> None:
        self.inner = inner
        self.group = group

    def __call__(self, hidden: Float[Array, "*batch part"]) -> Float[Array, "*batch D"]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        weight, bias = self.inner.weight[...], self.inner.bias
        out = self.group.reduce(linear(flat, weight.reshape(weight.shape[0], -1)))
        out = out if bias is None else out + bias[...]
        return out.reshape(*hidden.shape[:-1], -1)
