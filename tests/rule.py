"""A constraint without a grammar, for tests of what the engine does with one."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence

import numpy as np

from step3_jax.engine.config import EngineConfig
from step3_jax.engine.core import EngineCore
from step3_jax.engine.executor import Executor
from step3_jax.engine.request import Prompt, Request, SequenceOutput
from step3_jax.sampling.params import SamplingParams


@dataclasses.dataclass
class RuleMatcher:
    """Follows an output by a function that says what may come next; a single allowed token other than `end` is forced."""

    rule: Callable[[Sequence[int]], set[int]]
    vocab_size: int
    end: int
    output: list[int] = dataclasses.field(default_factory=list)

    def accept(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if token not in self.rule(self.output):
                raise ValueError(f"token {token} is not allowed at {len(self.output)}")
            self.output.append(token)

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = mask_of(self.rule(self.output), self.vocab_size)

    def find_forced(self) -> list[int]:
        found = list(self.output)
        while len(allowed := self.rule(found)) == 1 and self.end not in allowed:
            found += allowed
        return found[len(self.output) :]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A constraint that allows what a function of the output returns."""

    rule: Callable[[Sequence[int]], set[int]]
    vocab_size: int
    end: int
    begins_after: int | None = None

    def begin(self) -> RuleMatcher:
        return RuleMatcher(self.rule, self.vocab_size, self.end)


def mask_of(allowed: set[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros((-(-vocab_size // 32) * 32,), np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def digit_rule(output: Sequence[int]) -> set[int]:
    """Tokens of one residue, in turn; half of them have no choice, and the 30th is the end, token 60."""
    if len(output) >= 30:
        return {60}
    if len(output) % 8 in (4, 5, 6, 7):
        return {len(output) + 10}
    return {token for token in range(60) if token % 3 == len(output) % 3}


def run_ruled(
    executor: Executor, *, max_model_len: int, max_num_batched_tokens: int = 4096, **settings: object
) -> list[list[int]]:
    """Tokens of two constrained sequences, of which one is free up to its third token, and of a free one beside them."""
    vocab_size = executor.config.text.vocab_size
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens, **settings)  # type: ignore[arg-type]
    core = EngineCore(executor, config, max_model_len=max_model_len)
    prompt = Prompt((3, 5, 7, 9, 11))

    def run(constraints: dict[str, Rule | None]) -> dict[str, list[int]]:
        sink: queue.SimpleQueue[SequenceOutput] = queue.SimpleQueue()
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=(60,))
        for name, constraint in constraints.items():
            core.add(Request(name, prompt, params, 0, constraint=constraint), sink)
        while core.has_work:
            core.step()
        found: dict[str, list[int]] = {name: [] for name in constraints}
        while not sink.empty():
            output = sink.get()
            assert not output.error, output.error
            found[output.request_id] += output.token_ids
        return found

    free = run({"free": None})["free"]
    late = Rule(digit_rule, vocab_size, 60, begins_after=free[2])
    together = run({"now": Rule(digit_rule, vocab_size, 60), "late": late, "free": None})
    assert together["free"] == free
    return [together["now"], together["late"], free]
