"""Time, cost and memory of a deployment's batches."""

from __future__ import annotations

import math

import numpy as np

from step3_jax.layout.deployment import Deployment
from step3_jax.layout.hardware import Hardware
from step3_jax.layout.role import Role, deployed_config
from step3_jax.planner.candidate import Candidate
from step3_jax.planner.cost import SECONDS_PER_HOUR, TOKENS_PER_PRICE, usd_per_million_tokens
from step3_jax.planner.estimate import JUDGES, Judge
from step3_jax.planner.expectation import Expectation, expect
from step3_jax.planner.memory import MemoryPlan, plan_memory
from step3_jax.planner.pipeline import Stages, count_decode, count_prefill
from step3_jax.planner.query import Found, Query, Speed
from step3_jax.planner.shape import ModelShape
from step3_jax.planner.stage import Arithmetic, Model, Numbers, Shares


class BatchTable:
    """Results for the batches of all candidates; shared quantities are computed once."""

    def __init__(self, query: Query) -> None:
        """Starts empty."""
        self.query = query
        self.config = deployed_config(query.config, query.weights, text_only=query.text_only)
        model = Model(self.config, query.weights, query.kv_cache, query.contexts, query.load)
        self._arithmetic = {judge: Arithmetic(model, by_chance=judge == "expected") for judge in JUDGES}
        self._shape = ModelShape.of_config(self.config)
        self._kv_bytes = model.kv_bytes
        self._expectations: dict[tuple[bool, str, str], Expectation] = {}
        self._fitting: dict[tuple[Candidate, int, int], int] = {}

    def expect(self, candidate: Candidate) -> Expectation:
        """The shares of the ideal that a candidate is expected to reach."""
        machines = candidate.machines
        key = (machines.is_apart, machines.attention.name, machines.ffn.name)
        if key not in self._expectations:
            query = self.query
            self._expectations[key] = expect(
                machines, self._shape, query.contexts.mean, query.kv_cache, query.measurements
            )
        return self._expectations[key]

    def count_stages(self, candidate: Candidate, rows: Numbers, judge: Judge) -> Stages:
        """The stages of a decode step for batches with this many sequences per device in a micro-batch."""
        return count_decode(self._arithmetic[judge], candidate.machines, rows, self._shares(candidate, judge))

    def prefill_seconds(self, candidate: Candidate, num_microbatches: int, judge: Judge) -> tuple[int, float]:
        """Chunks of the mean prompt, and the seconds of one."""
        prompt = self.query.contexts.prompt_tokens
        chunk = min(self.query.chunk_tokens, prompt)
        stages = count_prefill(
            self._arithmetic[judge],
            candidate.machines,
            chunk / num_microbatches,
            prompt,
            self._shares(candidate, judge),
        )
        return math.ceil(prompt / chunk), float(stages.step_seconds(num_microbatches)[0])

    def first_token_seconds(
        self, candidate: Candidate, num_microbatches: int, step_s: Numbers, judge: Judge
    ) -> Numbers:
        """Seconds to the first token of the mean prompt that waits for no other: chunks and decode calls alternate."""
        chunks, chunk_s = self.prefill_seconds(candidate, num_microbatches, judge)
        return chunks * (chunk_s + step_s)

    def cost_rate(self, candidate: Candidate) -> float:
        """USD per million seconds, or the device count if prices are missing: times a token's seconds it is its cost."""
        usd = candidate.usd_per_hour
        if usd is None or not self.query.has_prices:
            return float(candidate.num_devices)
        return usd * TOKENS_PER_PRICE / SECONDS_PER_HOUR

    def bound_rows(self, candidate: Candidate) -> int:
        """Sequences of a device for which weights and cache have room; ignores the workspace, so fewer may fit."""
        machines = candidate.machines
        left = self._find_room(machines.attention, machines.attention_role)
        if self._find_room(machines.ffn, machines.ffn_role) < 0:
            return 0
        return max(int(left / (self._kv_bytes * self.query.contexts.page_mean)), 0)

    def fit_rows(self, candidate: Candidate, num_microbatches: int, rows: int) -> int:
        """The most sequences of a device in a micro-batch, up to `rows`, that fit; 0 if not even one does."""
        key = (candidate, num_microbatches, rows)
        if key not in self._fitting:
            # Up to `low` fits, from `high` on does not.
            low, high = 0, rows + 1
            middle = rows
            while high - low > 1:
                if self.plan(candidate, num_microbatches, middle).problems:
                    high = middle
                else:
                    low = middle
                middle = (low + high) // 2
            self._fitting[key] = low
        return self._fitting[key]

    def plan(self, candidate: Candidate, num_microbatches: int, rows: int, *, has_remedies: bool = False) -> MemoryPlan:
        """The memory of a batch, by the rule of `step3 plan memory --no-compile`."""
        return plan_memory(
            self.query.config,
            self.deploy(candidate, num_microbatches, rows),
            memory_gib=candidate.attention.hardware.memory_gib,
            ffn_memory_gib=candidate.ffn.hardware.memory_gib,
            text_only=self.query.text_only,
            memory_share=self.query.memory_share,
            chunk_tokens=self.query.chunk_tokens,
            has_remedies=has_remedies,
        )

    def deploy(self, candidate: Candidate, num_microbatches: int, rows: int) -> Deployment:
        """The deployment of a batch. Its context is the mean of the device whose sequences are longest together."""
        query, contexts = self.query, self.query.contexts
        context = contexts.longest
        if contexts.deviation:
            total = np.array([float(rows * num_microbatches)])
            busiest = contexts.count_busiest(total, candidate.num_attention, is_paged=True)
            context = min(math.ceil(float(busiest[0] / total[0])), context)
        return candidate.deploy(query.weights, query.kv_cache, num_microbatches, rows, context)

    def find(self, candidate: Candidate, num_microbatches: int, rows: int, limit: str) -> Found:
        """The full result for a batch that fits.

        Args:
          candidate: The devices.
          num_microbatches: Micro-batches in flight.
          rows: Sequences of a device in a micro-batch.
          limit: What limits the batch.
        """
        ideal, expected = (self._describe(candidate, num_microbatches, rows, judge) for judge in ("ideal", "expected"))
        plan = self.plan(candidate, num_microbatches, rows)
        return Found(
            candidate, plan.deployment, rows, plan.kv_tokens or 0, ideal, expected, self.expect(candidate), limit
        )

    def _describe(self, candidate: Candidate, num_microbatches: int, rows: int, judge: Judge) -> Speed:
        stages = self.count_stages(candidate, np.array([float(rows)]), judge)
        step_s = stages.step_seconds(num_microbatches)
        first = self.first_token_seconds(candidate, num_microbatches, step_s, judge)
        rate = rows * num_microbatches * candidate.num_attention / float(step_s[0])
        usd = candidate.usd_per_hour
        return Speed(
            step_s=float(step_s[0]),
            first_token_s=float(first[0]),
            tokens_per_s=rate,
            tokens_per_s_per_device=rate / candidate.num_devices,
            usd_per_million_tokens=None if usd is None else usd_per_million_tokens(1 / rate, usd),
            binds=stages.find_binding(num_microbatches, 0),
        )

    def _shares(self, candidate: Candidate, judge: Judge) -> Shares:
        return Shares() if judge == "ideal" else self.expect(candidate).shares

    def _find_room(self, hardware: Hardware, role: Role) -> float:
        """Bytes that weights leave of a device's usable memory."""
        weights = sum(self._arithmetic[self.query.judge].weight_parts(role).values())
        return hardware.memory_gib * 2**30 * self.query.memory_share - weights
