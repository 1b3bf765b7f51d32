"""Counts and times of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from step3_jax.engine.state import Report


@dataclasses.dataclass
class EngineStats:
    """Counts and times since the engine was made; the other times exclude compiling.

    Attributes:
      num_requests: Requests that have ended.
      num_prompt_tokens: Tokens of the prompts that were prefilled or found cached, each prompt once.
      num_prefilled_tokens: Tokens prefilled, recomputed ones too. A prompt's last token is part of its first decode step.
      num_generated_tokens: Tokens generated.
      num_preemptions: Sequences that lost their pages to others and were recomputed.
      prefix_cache_queries: Prompt tokens looked up in the prefix cache.
      prefix_cache_hits: Those that were found.
      num_images: Images in prompts.
      num_known_images: Those whose features were cached.
      image_encode_s: Time of the vision tower.
      prefill_s: Time of prefill, including images.
      decode_s: Time of the decode loop.
      num_decode_calls: Decode calls.
      num_decode_steps: Their steps.
      num_drafts: Steps of sequences for which tokens were guessed.
      num_draft_tokens: Tokens that were guessed, and verified by the model.
      num_accepted_tokens: Those that were right.
      num_accepted_tokens_per_pos: The same by position after the last token: how often the first was right, the second, ...
      mask_s: Time spent finding which tokens constrained sequences may get.
      compile_s: Time of tracing and compiling.
      num_compilations: Programs traced; each is then compiled, or found in the compile cache.
      afd_wait_s: Time that attention devices waited for FFN devices, including compiling; None where that is not known.
      expert_tokens: Prompt tokens that each expert got, int64 [layers, E], in the MoE layers except the model's last
        layer. None before the first chunk, and where the executor does not count them.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_images: int = 0
    num_known_images: int = 0
    image_encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_decode_calls: int = 0
    num_decode_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    mask_s: float = 0.0
    compile_s: float = 0.0
    num_compilations: int = 0
    afd_wait_s: float | None = None
    expert_tokens: np.ndarray | None = None

    def count_compilations(self, compile_s: float, num_traces: Mapping[str, int]) -> None:
        """Takes an executor's counts: the time it spent so far, and how often it traced each of its calls."""
        self.compile_s, self.num_compilations = compile_s, sum(num_traces.values())

    def count_experts(self, counts: Int[np.ndarray, "layers E"]) -> None:
        """Takes the number of a chunk's tokens that each expert got."""
        self.expert_tokens = counts.astype(np.int64) + (0 if self.expert_tokens is None else self.expert_tokens)

    def count_decode(self, report: Report, elapsed_s: float) -> None:
        """Takes a decode call's report, and how long it took."""
        self.decode_s += elapsed_s
        self.num_decode_calls += 1
        self.num_decode_steps += report.num_steps
        self.num_generated_tokens += int(report.num_new.sum())
        if report.drafts is None:
            return
        drafted, accepted = report.drafts.drafted.sum(axis=0), report.drafts.accepted.sum(axis=0)
        self.num_drafts += int(drafted[0])
        self.num_draft_tokens += int(drafted.sum())
        self.num_accepted_tokens += int(accepted.sum())
        before = self.num_accepted_tokens_per_pos or (0,) * len(accepted)
        self.num_accepted_tokens_per_pos = tuple(int(one) + int(new) for one, new in zip(before, accepted, strict=True))

    @property
    def acceptance_rate(self) -> float:
        """Share of guessed tokens that were right; 0 before the first."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def expert_load(self) -> list[float]:
        """Tokens of the busiest expert divided by the mean over all, for each MoE layer; 1 is even, E the worst."""
        counts = self.expert_tokens
        if counts is None or not counts.size or not counts.sum():
            return []
        return [float(load) for load in counts.max(axis=1) / counts.mean(axis=1)]

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0 before the first prompt."""
        return self.num_prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second, over all rows; 0 before the first."""
        return self.num_generated_tokens / self.decode_s if self.decode_s > 0 else 0.0
