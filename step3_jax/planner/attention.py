"""The cost of one decoded token in the attention of some layers, by design: cache bytes, FLOPs, projection weights.

The formulas are those behind Tables 2 and 3 of arXiv 2507.19427: one token, all layers of the group, attending to the
whole context, two FLOPs per multiply-add. Norms, rotary embedding and softmax are left out, as in the report.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from step3_jax.planner.data_file import Reader

# How MLA's value product is counted: over latent and rotary columns, as in the report's tables, or only over the latent
# ones, which is all that the kernel has to compute.
CountRule = Literal["report", "exact"]


class AttentionGroup(Protocol):
    """Layers of a model with the same attention design."""

    @property
    def design(self) -> str:
        """ "mfa", "gqa", "mla" or "linear": the key for looking up measured efficiencies."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        ...

    def kv_bytes_held(self, context_tokens: float, element_bytes: float) -> float:
        """Bytes of cache of a sequence of that length."""
        ...

    def kv_bytes_read(self, context_tokens: float, element_bytes: float) -> float:
        """Bytes of cache that the next token moves."""
        ...

    def flops(self, context_tokens: float, rule: CountRule) -> float:
        """FLOPs of the scores and of the sum over values."""
        ...

    def projection_weights(self, hidden_size: int) -> int:
        """Weights of the matrices before and after, in all layers of the group."""
        ...


@dataclasses.dataclass(frozen=True)
class HeadAttention:
    """Softmax attention with a few key/value heads: MHA, GQA, and MFA with one of them.

    Attributes:
      num_layers: Layers of the group.
      num_heads: Query heads.
      num_kv_heads: Heads of keys and values.
      head_dim: Size of a head.
      query_rank: Width between the two query matrices of MFA; None for a single one.
      chunk_tokens: A token attends to at most this many; None for the whole context. A full chunk is charged, not the
        mean fill.
      kv_element_bytes: Bytes of a cached number if the model fixes it; None for the requested dtype.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_rank: int | None = None
    chunk_tokens: int | None = None
    kv_element_bytes: float | None = None

    @property
    def design(self) -> str:
        """ "mfa" if queries are factorised, else "gqa"."""
        return "gqa" if self.query_rank is None else "mfa"

    def kv_bytes_held(self, context_tokens: float, element_bytes: float) -> float:
        """Keys and values of the tokens attended to."""
        size = self.kv_element_bytes or element_bytes
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * size * self._attended(context_tokens)

    def kv_bytes_read(self, context_tokens: float, element_bytes: float) -> float:
        """The whole cache is read once."""
        return self.kv_bytes_held(context_tokens, element_bytes)

    def flops(self, context_tokens: float, rule: CountRule) -> float:
        """Scores and values of each query head; both rules agree."""
        return self.num_layers * 4 * self.num_heads * self.head_dim * self._attended(context_tokens)

    def projection_weights(self, hidden_size: int) -> int:
        """Queries in one or two matrices, keys, values, output."""
        queries = self.num_heads * self.head_dim
        down_up = hidden_size * queries
        if self.query_rank is not None:
            down_up = self.query_rank * (hidden_size + queries)
        return self.num_layers * (down_up + hidden_size * (2 * self.num_kv_heads * self.head_dim + queries))

    def _attended(self, context_tokens: float) -> float:
        return context_tokens if self.chunk_tokens is None else min(context_tokens, self.chunk_tokens)


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """MLA with its up-projections absorbed: heads share one latent row and one rotary row for each token.

    Attributes:
      num_layers: Layers of the group.
      num_heads: Query heads.
      latent_dim: Size of the compressed keys and values.
      rope_dim: Size of the rotary part of keys.
      nope_dim: Size of the part of a query without rotary embedding.
      value_dim: Size of a head's values.
      query_rank: Width between the two query matrices.
      kv_element_bytes: Of a cached number where the model fixes it; None for what is asked for.
    """

    num_layers: int
    num_heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int
    kv_element_bytes: float | None = None

    @property
    def design(self) -> str:
        """ "mla"."""
        return "mla"

    def kv_bytes_held(self, context_tokens: float, element_bytes: float) -> float:
        """The latent and the rotary row of each token."""
        size = self.kv_element_bytes or element_bytes
        return self.num_layers * (self.latent_dim + self.rope_dim) * size * context_tokens

    def kv_bytes_read(self, context_tokens: float, element_bytes: float) -> float:
        """The whole cache is read once."""
        return self.kv_bytes_held(context_tokens, element_bytes)

    def flops(self, context_tokens: float, rule: CountRule) -> float:
        """Scores over latent and rotary columns; values over both by the report's rule, over the latent ones by "exact"."""
        scores = self.latent_dim + self.rope_dim
        values = scores if rule == "report" else self.latent_dim
        return self.num_layers * 2 * self.num_heads * (scores + values) * context_tokens

    def projection_weights(self, hidden_size: int) -> int:
        """Queries down and up, latent and rotary rows, the absorbed up-projection once, output."""
        queries = self.query_rank * (hidden_size + self.num_heads * (self.nope_dim + self.rope_dim))
        rows = hidden_size * (self.latent_dim + self.rope_dim)
        absorbed = self.num_heads * self.latent_dim * (self.nope_dim + self.value_dim)
        return self.num_layers * (queries + rows + absorbed + self.num_heads * self.value_dim * hidden_size)


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """Lightning attention: a square state for each head instead of a cache.

    The report prints only its results; FLOPs per element, passes and matrices are the integers that reproduce them.

    Attributes:
      num_layers: Layers of the group.
      num_heads: Heads.
      head_dim: Size of a head.
      state_bytes: Bytes of one number of the state.
      state_passes: How often a token moves the state: it is read and written.
      flops_per_state_element: FLOPs of one token.
      num_matrices: Projections of hidden size by all heads.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    state_bytes: float = 4
    state_passes: int = 2
    flops_per_state_element: int = 10
    num_matrices: int = 5

    @property
    def design(self) -> str:
        """ "linear"."""
        return "linear"

    def kv_bytes_held(self, context_tokens: float, element_bytes: float) -> float:
        """The state, whatever the context."""
        return self._state_elements * self.state_bytes

    def kv_bytes_read(self, context_tokens: float, element_bytes: float) -> float:
        """The state, read and written."""
        return self._state_elements * self.state_bytes * self.state_passes

    def flops(self, context_tokens: float, rule: CountRule) -> float:
        """FLOPs of the state's update and of the product with the query."""
        return self._state_elements * self.flops_per_state_element

    def projection_weights(self, hidden_size: int) -> int:
        """Query, key, value, gate, output."""
        return self.num_layers * self.num_matrices * hidden_size * self.num_heads * self.head_dim

    @property
    def _state_elements(self) -> int:
        return self.num_layers * self.num_heads * self.head_dim**2


def read_group(reader: Reader) -> AttentionGroup:
    """Reads a group from its part of a model's file.

    Raises:
      ValueError: If a value is missing or wrong.
    """
    kind = reader.choice("kind", ("mfa", "gqa", "mla", "lightning"))
    num_layers, num_heads = reader.whole("layers"), reader.whole("heads")
    group: AttentionGroup
    if kind == "mla":
        group = LatentAttention(
            num_layers,
            num_heads,
            latent_dim=reader.whole("latent_dim"),
            rope_dim=reader.whole("rope_dim"),
            nope_dim=reader.whole("nope_dim"),
            value_dim=reader.whole("value_dim"),
            query_rank=reader.whole("query_rank"),
            kv_element_bytes=reader.number("kv_element_bytes") if reader.has("kv_element_bytes") else None,
        )
    elif kind == "lightning":
        group = LinearAttention(
            num_layers,
            num_heads,
            head_dim=reader.whole("head_dim"),
            state_bytes=reader.number("state_bytes"),
            state_passes=reader.whole("state_passes"),
            flops_per_state_element=reader.whole("flops_per_state_element"),
            num_matrices=reader.whole("num_matrices"),
        )
    else:
        group = HeadAttention(
            num_layers,
            num_heads,
            num_kv_heads=reader.whole("kv_heads"),
            head_dim=reader.whole("head_dim"),
            query_rank=reader.whole("query_rank") if kind == "mfa" else None,
            chunk_tokens=reader.whole("chunk_tokens") if reader.has("chunk_tokens") else None,
            kv_element_bytes=reader.number("kv_element_bytes") if reader.has("kv_element_bytes") else None,
        )
    reader.check_all_read()
    return group
