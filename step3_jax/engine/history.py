"""Prompt and output of the sequences in slots, kept on the devices between calls: a call brings only what has come.

A slot's row is read up to its sequence's length and no further, so whatever another sequence has left there may stay.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int

from step3_jax.engine.bucket_table import power_of_two
from step3_jax.engine.sequence import Sequence
from step3_jax.engine.state import HistoryUpdate

# Tokens of one write at least: as many are sent however few there are, and a long prompt takes many writes.
_LEAST_TOKENS = 256
_owners = itertools.count()


class HistoryPacker:
    """Knows what the devices have of each slot, and packs the rest."""

    def __init__(self, num_tokens: int, max_steps: int) -> None:
        """Takes M, and the most tokens that a call makes of a sequence."""
        self._owner = next(_owners)
        self._num_tokens = num_tokens
        self._max_steps = max_steps
        # The sequence of each slot, and how many of its tokens the devices have. One that has ended is not kept for it.
        self._known: list[tuple[weakref.ref[Sequence] | None, int]] = []

    def forget(self) -> None:
        """What the devices have is unknown from now on."""
        self._known = []

    def pack(self, slots: Seq[Sequence | None]) -> HistoryUpdate:
        """What the devices lack of the sequences, which have only grown since the last call. None: not looked at."""
        if len(self._known) != len(slots):
            self._known = [(None, 0)] * len(slots)
        continues = False
        places: list[Int[np.ndarray, " _"]] = []
        tokens: list[int] = []
        for slot, sequence in enumerate(slots):
            if sequence is None:
                continue
            known, count = self._known[slot]
            if known is None or known() is not sequence:
                count = 0
            continues |= count > 0
            end = len(sequence.token_ids)
            places.append(np.arange(count, end, dtype=np.int32) + slot * self._num_tokens)
            tokens += sequence.token_ids[count:]
            self._known[slot] = weakref.ref(sequence), end
        update = self.pack_nothing(len(slots), -(-len(tokens) // self._size(len(slots))))
        if tokens:
            update.places.reshape(-1)[: len(tokens)] = np.concatenate(places)
            update.tokens.reshape(-1)[: len(tokens)] = tokens
        return update._replace(continues=continues)

    def pack_nothing(self, num_slots: int, num_writes: int) -> HistoryUpdate:
        """Writes of padding alone."""
        shape = num_writes, self._size(num_slots)
        places = np.full(shape, num_slots * self._num_tokens, np.int32)
        return HistoryUpdate(self._owner, num_slots, self._num_tokens, False, places, np.zeros(shape, np.int32))

    def _size(self, num_slots: int) -> int:
        """Tokens of one write: what a call makes of all sequences, so that the next call takes one."""
        return power_of_two(max(_LEAST_TOKENS, num_slots * self._max_steps))


class DeviceHistory:
    """The history on an executor's devices."""

    def __init__(self, jit: Callable[..., jax.stages.Wrapped], sharding: Sharding | None) -> None:
        """Takes what compiles.

        Args:
          jit: `jax.jit` with the options of the executor's platform.
          sharding: Where the array lies, whole on every device; None for the default device.
        """
        self._held: tuple[int, Int[Array, "B M"]] | None = None
        placed: dict[str, object] = {} if sharding is None else {"out_shardings": sharding}
        self._begin = jit(_begin, static_argnums=(0, 1), **placed)
        if sharding is not None:
            placed["in_shardings"] = (sharding, sharding, sharding)
        self._write = jit(_write, donate_argnums=0, **placed)

    def write(self, update: HistoryUpdate) -> Int[Array, "B M"]:
        """The history with what a call brings; the array that was given before is consumed if anything is written.

        Raises:
          RuntimeError: If the call needs what was written before, and that is there no more.
        """
        shape = update.num_slots, update.num_tokens
        held, self._held = self._held, None
        is_kept = held is not None and held[0] == update.owner and held[1].shape == shape
        if update.continues and not is_kept:
            raise RuntimeError(
                "another engine has used this executor while sequences were under way, and their tokens are no longer on "
                "the devices: let one engine's requests end before another's begin"
            )
        # What a call that failed has left is not touched again.
        is_dropped = len(update.places) > 0 and not update.continues
        history = self._begin(*shape) if held is None or not is_kept or is_dropped else held[1]
        for places, tokens in zip(update.places, update.tokens, strict=True):
            history = self._write(history, places, tokens)
        self._held = update.owner, history
        return history


def _write(history: Int[Array, "B M"], places: Int[Array, " N"], tokens: Int[Array, " N"]) -> Int[Array, "B M"]:
    return history.reshape(-1).at[places].set(tokens, mode="drop").reshape(history.shape)


def _begin(num_slots: int, num_tokens: int) -> Int[Array, "B M"]:
    return jnp.zeros((num_slots, num_tokens), jnp.int32)
