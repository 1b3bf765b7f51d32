"""Static sizes of a call, and the order in which a worker visits its fragments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import Ref
from pallas_kernels.mfa_decode.plan import BLOCK
from pallas_kernels.storage import INT4_GROUP

# Rows of one tensor-core tile.
TILE = 64
# float32: the bits of the exponent, those of the mantissa, and 1.0.
EXPONENT, MANTISSA, ONE = 0x7F800000, 0x007FFFFF, 0x3F800000

# Operands and scratch of the kernel by name.
Refs = Mapping[str, Ref]
Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static sizes of a call.

    Attributes:
      storage: Format of the pages.
      tokens, heads, head_dim: T, H and K of the queries.
      page_size: Tokens of a page, a multiple of `plan.BLOCK`.
      slots: Slots of one ring.
      scale: Scale of the scores, times log2(e): exponentials are powers of 2.
      dtype: Dtype of weights and values in tensor-core products; also of queries and keys, unless `is_narrow`.
    """

    storage: str
    tokens: int
    heads: int
    head_dim: int
    page_size: int
    slots: int
    scale: float
    dtype: jax.typing.DTypeLike

    @property
    def is_shared(self) -> bool:
        """Whether both warpgroups read every block, each for its own tile."""
        return self.tokens * self.heads > TILE

    @property
    def is_narrow(self) -> bool:
        """Whether queries and keys are multiplied in e4m3, see `queries`."""
        return self.storage != "bfloat16"

    @property
    def part_columns(self) -> int:
        """Columns of a head in one e4m3 product: a row of swizzled shared memory, or those that share a scale."""
        return INT4_GROUP if self.storage == "int4" else 128

    @property
    def num_parts(self) -> int:
        """Parts of a head."""
        return self.head_dim // self.part_columns

    @property
    def tiles_per_cta(self) -> int:
        return 2 if self.is_shared else 1

    @property
    def rings(self) -> int:
        return 1 if self.is_shared else 2

    @property
    def rows(self) -> int:
        """T*H rounded up to whole tiles of whole CTAs."""
        per_cta = self.tiles_per_cta * TILE
        return -(-self.tokens * self.heads // per_cta) * per_cta

    @property
    def blocks_per_page(self) -> int:
        return self.page_size // BLOCK

    def slot(self, ring: jax.Array | int, turn: jax.Array) -> jax.Array:
        """The slot of tile number `turn` of a ring, counting both keys and values."""
        return ring * self.slots + lax.rem(turn, jnp.int32(self.slots))

    def turn(self, turns: tuple[jax.Array, jax.Array], ring: jax.Array | int) -> jax.Array:
        """Tiles of the ring before this fragment."""
        return turns[0] if self.is_shared else jnp.where(ring == 0, turns[0], turns[1])

    def advance(self, turns: tuple[jax.Array, jax.Array], blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same after a fragment of this many blocks, two tiles each; the first ring has the odd one."""
        if self.is_shared:
            return turns[0] + 2 * blocks, turns[1]
        return turns[0] + 2 * lax.div(blocks + 1, jnp.int32(2)), turns[1] + 2 * lax.div(blocks, jnp.int32(2))


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A worker's part of one sequence; all scalars.

    Attributes:
      sequence: Its index in the batch.
      first_block: First block in the sequence.
      num_blocks: Number of blocks; 0 for an empty sequence.
      number: Its number among all fragments.
    """

    sequence: jax.Array
    first_block: jax.Array
    num_blocks: jax.Array
    number: jax.Array


def for_each_fragment(refs: Refs, visit: Callable[[Fragment, Carry], Carry], carry: Carry) -> Carry:
    """Calls `visit` for each sequence that this worker has a part of, in order."""
    worker = lax.axis_index("worker")
    begin, end, first, count = (refs["spans"][worker, column] for column in range(4))

    def step(index: jax.Array, carry: Carry) -> Carry:
        sequence = first + index
        start, stop = refs["starts"][sequence], refs["starts"][sequence + 1]
        low, high = jnp.maximum(begin, start), jnp.minimum(end, stop)
        return visit(Fragment(sequence, low - start, jnp.maximum(high - low, 0), sequence + worker), carry)

    return lax.fori_loop(0, count, step, carry)
