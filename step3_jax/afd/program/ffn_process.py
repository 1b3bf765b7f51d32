"""A process of the FFN side in executor `program`."""

from __future__ import annotations

import functools

from jaxtyping import Array, Int

from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.ffn_loop import FfnLoop, FfnWeights
from step3_jax.afd.program.process import COPY, OWN, RoleProcess
from step3_jax.afd.program.wire import Slots
from step3_jax.afd.roles import take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.engine.drive.call import Call, DecodeSizes, MeasureMemory, PrefillSizes
from step3_jax.engine.drive.worker import Outcome, Worker
from step3_jax.engine.executor import Started
from step3_jax.engine.state import Report
from step3_jax.model.step3 import Step3


class FfnProcess(RoleProcess, Worker):
    """A process of the FFN side: it holds no cache, is told only the sizes of a batch, and decodes no images.

    Attributes:
      weights: The weights this process holds, as arrays over all devices.
      loop: The work of a call on each device.
    """

    takes_batches = False

    def __init__(self, model: Step3, topology: AfdTopology, *, num_microbatches: int, payload: str) -> None:
        """As for `make_program_executor`."""
        super().__init__(model, topology, payload)
        parts = take_apart(model)
        self.loop = FfnLoop(parts, self.config.text, topology, self.form, num_microbatches, self.dtype, self._observe)
        self.weights: FfnWeights = [self._take(part.leaves) for part in parts.ffn]
        own, copies = self._own, self._copies
        self._prefill = self._jit(self._run_prefill, static_argnums=1, in_shardings=(own,), out_shardings=copies)
        self._decode = self._jit(
            self._run_decode, static_argnums=(2, 3, 4), in_shardings=(own, copies), out_shardings=copies
        )

    def run(self, call: Call) -> Outcome:
        """See `Worker.run`.

        Raises:
          ValueError: If the FFN side has no part in the call.
        """
        if isinstance(call, MeasureMemory):
            return None
        if isinstance(call, PrefillSizes):
            self._call(self._prefill, self.weights, call.num_tokens // self.num_shards)
            return Started(None)
        if isinstance(call, DecodeSizes):
            numbers = self._numbers(call.num_steps)
            sizes = call.num_rows // self.num_shards, call.max_steps, call.num_guesses
            _, taken = self._call(self._decode, self.weights, numbers, *sizes)
            self._num_steps += int(taken)
            return Started(None)
        raise ValueError(f"{type(call).__name__} is not for the FFN side")

    def _run_prefill(self, weights: FfnWeights, num_tokens: int) -> Slots:
        self.num_traces["prefill"] += 1
        return self._on_union(functools.partial(self.loop.prefill, num_tokens=num_tokens), (OWN,), COPY)(weights)

    def _run_decode(
        self, weights: FfnWeights, numbers: Numbers, num_rows: int, max_steps: int, num_guesses: int
    ) -> tuple[Report, Int[Array, ""]]:
        self.num_traces["decode"] += 1
        run = functools.partial(self.loop.decode, num_rows=num_rows, max_steps=max_steps, num_guesses=num_guesses)
        return self._on_union(run, (OWN, COPY), COPY)(weights, numbers)
