"""An executor without a model: its cache holds token ids, and its next token is a digest of all tokens it finds there.

So a page that holds what it should not, or that two sequences write, shows in the tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.config import ModelConfig
from step3_jax.engine.executor import Executor, Started
from step3_jax.engine.state import FULL, IDLE, RUNNING, STOPPED, DecodeCall, DraftCounts, PrefillBatch, Report
from tests.small import small_text

VOCAB_SIZE = 61


def next_token(token_ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(token_ids, np.int32).tobytes()) % VOCAB_SIZE


def next_allowed(mask: np.ndarray, token: int) -> int:
    """The first allowed token from `token` on, around the end of the vocabulary."""
    order = [*range(token, VOCAB_SIZE), *range(token)]
    return next(one for one in order if mask[one // 32] >> (one % 32) & 1)


def expected(prompt: Sequence[int], count: int, stop_ids: Sequence[int] = ()) -> tuple[int, ...]:
    """Tokens that a prompt gets, the one that ends it included."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
        if ids[-1] in stop_ids:
            break
    return tuple(ids[len(prompt) :])


class _Failing(Started[object]):
    """A call whose failure shows when its result is requested."""

    def result(self) -> object:
        raise self._value


class FakeExecutor(Executor):
    """See the module.

    Attributes:
      failures: Errors to raise, by the name of the call, each once; "late" ones when the result is asked for.
      calls: Names of the calls so far.
      prefilled: Tokens prefilled so far.
      history: Prompt and output of the sequences in slots, as far as they were sent.
      history_bytes: Sent of it so far.
    """

    def __init__(self, num_shards: int = 1) -> None:
        config = ModelConfig(
            dtype="float32", text=small_text(vocab_size=VOCAB_SIZE, max_position_embeddings=2048), vision=None
        )
        super().__init__(config, jax.local_devices()[:1], jnp.dtype(jnp.float32), num_shards)
        self.failures: dict[str, BaseException] = {}
        self.calls: list[str] = []
        self.prefilled = 0
        self.history: np.ndarray | None = None
        self.history_bytes = 0

    def allocate_cache(self, num_pages: int, storage: str) -> np.ndarray:
        return np.full((num_pages, PAGE_SIZE), -1, np.int32)

    def _encode_images(self, pixels: np.ndarray) -> jax.Array:
        self._enter("encode")
        return jnp.zeros((len(pixels), 4, 32))

    def prefill(self, cache: np.ndarray, batch: PrefillBatch) -> tuple[np.ndarray, Started[object]]:
        self._enter("prefill")
        rows = len(batch.lengths) // self.num_shards
        starts = batch.query_starts.reshape(self.num_shards, rows + 1)
        tokens = batch.token_ids.reshape(self.num_shards, -1)
        for row, length in enumerate(batch.lengths):
            shard, place = divmod(row, rows)
            own = tokens[shard, starts[shard, place] : starts[shard, place + 1]]
            for position, token in zip(range(length - len(own), length), own, strict=True):
                cache[batch.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = token
            self.prefilled += len(own)
        return cache, self._started("late_prefill", None)

    def decode(self, cache: np.ndarray, call: DecodeCall) -> tuple[np.ndarray, Started[Report]]:
        self._enter("decode")
        batch = call.batch
        history = self._write_history(call)
        count = len(batch.last)
        tokens = np.zeros((count, call.max_steps), np.int32)
        num_new, finish = np.zeros((count,), np.int32), np.where(batch.is_active, RUNNING, IDLE)
        last, steps = batch.last.copy(), np.zeros((count,), np.int32)
        if call.speculation is not None:
            for row in np.flatnonzero(batch.is_active):
                ids = [*cache[batch.table[row]].reshape(-1)[: batch.cached[row]], batch.last[row]]
                assert history[row, : len(ids)].tolist() == ids, "guesses are looked up in other tokens"
        for _ in range(call.num_steps):
            steps += finish == RUNNING
            for row in np.flatnonzero(finish == RUNNING):
                for _ in range(self._num_verified(cache, call, row, num_new[row])):
                    position = batch.cached[row] + num_new[row]
                    cache[batch.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = last[row]
                    found = cache[batch.table[row]].reshape(-1)[: position + 1]
                    token = next_token(found)
                    if batch.mask is not None and (batch.mask[row] != -1).any():
                        assert call.num_steps == 1, "a mask is that of one token"
                        token = next_allowed(batch.mask[row], token)
                    last[row] = tokens[row, num_new[row]] = token
                    num_new[row] += 1
                    if last[row] in call.sampling.stop_ids[row]:
                        finish[row] = STOPPED
                    elif batch.num_generated[row] + num_new[row] >= call.sampling.max_tokens[row]:
                        finish[row] = FULL
                    elif last[row] == call.sampling.pause_ids[row]:
                        finish[row] = STOPPED
                    if finish[row] != RUNNING:
                        break
            if not (finish == RUNNING).any() or (call.leave_early and np.isin(finish, (STOPPED, FULL)).any()):
                break
            if batch.max_new is not None and ((finish == RUNNING) & (num_new >= batch.max_new)).any():
                break
        none = np.zeros((count, 0 if call.speculation is None else call.speculation.num_speculative_tokens), np.int32)
        drafts = None if call.speculation is None else DraftCounts(steps, none, none)
        return cache, self._started("late_decode", Report(tokens, num_new, finish, None, drafts))

    def _write_history(self, call: DecodeCall) -> np.ndarray | None:
        """The history of all slots with what a call brings of it."""
        update = call.history
        if update is None:
            return call.batch.history
        shape = update.num_slots, update.num_tokens
        is_kept = self.history is not None and self.history.shape == shape
        assert is_kept or not update.continues, "the call needs what is not there"
        if not is_kept or (len(update.places) and not update.continues):
            self.history = np.full(shape, -1, np.int32)
        places, tokens = update.places.reshape(-1), update.tokens.reshape(-1)
        is_own = places < self.history.size
        self.history.reshape(-1)[places[is_own]] = tokens[is_own]
        self.history_bytes += update.num_bytes
        return self.history

    @staticmethod
    def _num_verified(cache: np.ndarray, call: DecodeCall, row: int, num_new: int) -> int:
        """Tokens of a row's next step. Where tokens are guessed some are, and what is wrong stays after them."""
        batch = call.batch
        if call.speculation is None or batch.max_new is None:
            return 1
        room = min(batch.max_new[row], call.sampling.max_tokens[row] - batch.num_generated[row]) - num_new
        width = max(1, min(call.speculation.width, room))
        first = batch.cached[row] + num_new
        for position in range(first, first + width):
            cache[batch.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = -2
        return 1 + int(first) % width

    def copy_pages(self, cache: np.ndarray, sources: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        self._enter("copy")
        cache[list(targets)] = cache[list(sources)]
        return cache

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        error = self.failures.pop(name, None)
        if error is not None:
            raise error

    def _started(self, name: str, value: object) -> Started:
        error = self.failures.pop(name, None)
        return Started(value) if error is None else _Failing(error)
