"""A model that says what a test tells it to, under the real engine: an executor whose tokens are those of given replies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.config import ModelConfig
from step3_jax.engine.executor import Executor, Started
from step3_jax.engine.state import FULL, IDLE, RUNNING, STOPPED, DecodeCall, PrefillBatch, Report
from step3_jax.sampling.params import MAX_LOGPROBS
from step3_jax.sampling.sampler import StepLogprobs
from step3_jax.text.tokenizer import Tokenizer
from tests.process import HARD_LIMIT_S

# Written where the grammar forbids any more of the reply; forbidden too, it ends the request with an error.
NO_WAY = 1

# What the model writes after a prompt, given as text.
Reply = Callable[[str], str]


class ReplyExecutor(Executor):
    """Writes replies token by token, then ends. Its cache holds token ids, so mixed-up pages show.

    Attributes:
      reply: What is written after a prompt.
      gate: Decode calls wait until it is set.
      failure: An error that the next decode call raises.
      is_stubborn: Whether it breaks off where its reply is not allowed; otherwise it writes something allowed.
      num_decoded: Tokens made so far.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, reply: Reply) -> None:
        super().__init__(config, jax.local_devices()[:1], jnp.dtype(jnp.float32), 1)
        self.reply = reply
        self.gate = threading.Event()
        self.gate.set()
        self.failure: BaseException | None = None
        self.is_stubborn = True
        self.num_decoded = 0
        self._tokenizer = tokenizer
        self._forced: set[tuple[int, ...]] = set()
        self._replies: dict[tuple[int, ...], list[int]] = {}

    def allocate_cache(self, num_pages: int, storage: str) -> np.ndarray:
        return np.full((num_pages, PAGE_SIZE), -1, np.int32)

    def prefill(self, cache: np.ndarray, batch: PrefillBatch) -> tuple[np.ndarray, Started[object]]:
        for row, length in enumerate(batch.lengths):
            own = batch.token_ids[batch.query_starts[row] : batch.query_starts[row + 1]]
            for position, token in zip(range(length - len(own), length), own, strict=True):
                cache[batch.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = token
        return cache, Started(None)

    def decode(self, cache: np.ndarray, call: DecodeCall) -> tuple[np.ndarray, Started[Report]]:
        assert self.gate.wait(HARD_LIMIT_S)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        batch, sampling = call.batch, call.sampling
        count = len(batch.last)
        tokens = np.zeros((count, call.max_steps), np.int32)
        num_new, finish = np.zeros((count,), np.int32), np.where(batch.is_active, RUNNING, IDLE)
        last = batch.last.copy()
        for _ in range(call.num_steps):
            for row in np.flatnonzero(finish == RUNNING):
                position = batch.cached[row] + num_new[row]
                cache[batch.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = last[row]
                known = cache[batch.table[row]].reshape(-1)[: position + 1]
                num_output = int(batch.num_generated[row] + num_new[row])
                last[row] = tokens[row, num_new[row]] = self._choose(known, num_output, batch.mask, row)
                num_new[row] += 1
                self.num_decoded += 1
                if last[row] in sampling.stop_ids[row] and num_output >= sampling.min_tokens[row]:
                    finish[row] = STOPPED
                elif num_output + 1 >= sampling.max_tokens[row]:
                    finish[row] = FULL
                elif last[row] == sampling.pause_ids[row]:
                    finish[row] = STOPPED
            if not (finish == RUNNING).any() or (call.leave_early and np.isin(finish, (STOPPED, FULL)).any()):
                break
        logprobs = _logprobs(tokens) if sampling.has_logprobs.any() else None
        return cache, Started(Report(tokens, num_new, finish, logprobs))

    def copy_pages(self, cache: np.ndarray, sources: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        cache[list(targets)] = cache[list(sources)]
        return cache

    def _encode_images(self, pixels: np.ndarray) -> jax.Array:
        num_tokens = self.config.image_token_len if pixels.shape[-1] == 728 else self.config.patch_token_len
        return jnp.zeros((len(pixels), num_tokens, self.config.text.hidden_size))

    def _choose(self, known: np.ndarray, num_output: int, mask: np.ndarray | None, row: int) -> int:
        wanted = self._next(known, num_output)
        if mask is None:
            return wanted
        allowed = np.flatnonzero(np.unpackbits(mask[row].view(np.uint8), bitorder="little"))
        if len(allowed) == 1 and len(known) - num_output == 1:
            # The rest of a prompt, of which the first token was prefilled.
            self._forced.add((*known.tolist(), int(allowed[0])))
            return int(allowed[0])
        if wanted in allowed or self.is_stubborn:
            return wanted if wanted in allowed else NO_WAY
        ends = [token for token in self._tokenizer.eos_ids if token in allowed]
        return int(ends[0] if ends else allowed[0])

    def _next(self, known: np.ndarray, num_output: int) -> int:
        ids = known.tolist()
        num_prompt = len(ids) - num_output
        if self._forced:
            ends = range(len(ids), num_prompt, -1)
            num_prompt = next((end for end in ends if tuple(ids[:end]) in self._forced), num_prompt)
        num_output = len(ids) - num_prompt
        prompt = tuple(ids[:num_prompt])
        if prompt not in self._replies:
            text = self.reply(self._tokenizer.decode(prompt))
            self._replies[prompt] = [*self._tokenizer.encode(text), *self._tokenizer.eos_ids[:1]]
        reply = self._replies[prompt]
        return reply[min(num_output, len(reply) - 1)]


def _logprobs(tokens: np.ndarray) -> StepLogprobs:
    """The chosen token has -0.5, the following ids less and less; the last one is impossible."""
    ids = tokens[..., None] + np.arange(MAX_LOGPROBS)
    values = -0.5 - np.arange(MAX_LOGPROBS, dtype=np.float32) * np.ones_like(ids, np.float32)
    values[..., -1] = -np.inf
    return StepLogprobs(
        np.full(tokens.shape, -0.5, np.float32), np.ones(tokens.shape, np.int32), ids.astype(np.int32), values
    )
