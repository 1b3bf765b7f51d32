"""A process of the attention side in executor `program`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.storage import Storage
from step3_jax.afd.program.attention_loop import AttentionLoop, AttentionWeights
from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.process import COPY, OWN, RoleProcess
from step3_jax.afd.roles import Vision, take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import Cache, copy_pages, count_pages, empty_cache
from step3_jax.engine.executor import Executor, Started, local_pages, num_copies
from step3_jax.engine.state import DecodeBatch, DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.layout.role import Role
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation


class AttentionProcess(RoleProcess, Executor):
    """A process of the attention side.

    Attributes:
      weights: The weights this process holds, as arrays over all devices.
      loop: The work of a call on each device.
    """

    def __init__(self, model: Step3, topology: AfdTopology, *, num_microbatches: int, payload: str) -> None:
        """As for `make_program_executor`."""
        super().__init__(model, topology, payload)
        parts = take_apart(model)
        self.loop = AttentionLoop(
            parts, self.config.text, topology, self.form, num_microbatches, self.dtype, self._observe
        )
        self.weights = AttentionWeights(
            self._take(parts.ends.leaves), [self._take(part.leaves) for part in parts.attention]
        )
        own, copies = self._own, self._copies
        self._prefill = self._jit(
            self._run_prefill, in_shardings=(own, own, copies), out_shardings=own, donate_argnums=1
        )
        self._decode = self._jit(
            self._run_decode,
            static_argnums=(6, 7),
            in_shardings=(own, own, copies, copies, copies, copies),
            out_shardings=(own, copies, copies),
            donate_argnums=1,
        )
        self._copy = self._jit(
            self._on_union(self._run_copy, (OWN, OWN, OWN), OWN),
            in_shardings=(own, copies, copies),
            out_shardings=own,
            donate_argnums=0,
        )
        self._vision = Vision(model, topology.tower)
        self._vision_leaves = [leaf.astype(self.run_dtype(leaf.dtype)) for leaf in self._vision.leaves]
        self._encode_jit = self._jit(self._run_encode, out_shardings=topology.attention.sharding())

    @property
    def role(self) -> Role:
        """See `Executor.role`."""
        return self.topology.attention_role

    @property
    def num_microbatches(self) -> int:
        """See `Executor.num_microbatches`."""
        return self.loop.num_microbatches

    @property
    def _everywhere(self) -> NamedSharding:
        return self._copies

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`; this process holds the pages of its own devices."""
        make = functools.partial(
            empty_cache, self.config.text, num_pages // self.num_shards, storage, as_bits=self.is_cpu
        )
        parts = [
            jax.jit(make, out_shardings=SingleDeviceSharding(device))() for device in self.topology.union.local_devices
        ]
        return jax.tree.map(lambda *leaves: self._spread(leaves), *parts)

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        sharding = self.topology.tower.sharding("images")
        placed = jax.make_array_from_callback(pixels.shape, sharding, pixels.__getitem__)
        return self._call(self._encode_jit, self._vision_leaves, placed)

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`."""
        return self._call(self._prefill, self.weights, cache, batch), Started(None)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`. After a sequence has ended, a call may take one more step, in which it does nothing."""
        given = (
            self._place_wide(call),
            self._place_sampling(call.sampling),
            self._numbers(call.num_steps),
            self._place(np.bool_(call.leave_early)),
        )
        static = call.max_steps, call.speculation
        cache, report, taken = self._call(self._decode, self.weights, cache, *given, *static)
        self._num_steps += int(taken)
        return cache, Started(call.cut_report(report))

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`; each device copies its own."""
        # FFN devices hold no pages; attention devices come first.
        num_parts, size = self.topology.union.size, num_copies(sources)
        num_own = count_pages(cache, self.config.text.num_hidden_layers) // num_parts
        own = (local_pages(pages, num_own, num_parts, size) for pages in (sources, targets))
        return self._call(self._copy, cache, *own)

    def prefill_program(self, cache: Cache, batch: PrefillBatch) -> jax.stages.Compiled:
        """The compiled chunk of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        return self._prefill.lower(self.weights, cache, batch).compile()

    def decode_program(
        self,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> jax.stages.Compiled:
        """The compiled decode loop of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        given = batch, sampling, self._numbers(1), self._place(np.bool_(False))
        return self._decode.lower(self.weights, cache, *given, max_steps, speculation).compile()

    # The functions below are traced; each counts its traces by a Python side effect.

    def _run_encode(self, leaves: list[Array], pixels: Float[Array, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        self.num_traces["encode_images"] += 1
        return self._vision.encode(leaves, pixels)

    def _run_copy(self, cache: Cache, sources: Int[Array, " copies"], targets: Int[Array, " copies"]) -> Cache:
        self.num_traces["copy_pages"] += 1
        return copy_pages(cache, sources, targets, self.config.text.num_hidden_layers)

    def _run_prefill(self, weights: AttentionWeights, cache: Cache, batch: PrefillBatch) -> Cache:
        self.num_traces["prefill"] += 1
        return self._on_union(self.loop.prefill, (OWN, OWN, COPY), OWN)(weights, cache, batch)

    def _run_decode(
        self,
        weights: AttentionWeights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        numbers: Numbers,
        leave_early: Bool[Array, ""],
        max_steps: int,
        speculation: Speculation | None,
    ) -> tuple[Cache, Report, Int[Array, ""]]:
        self.num_traces["decode"] += 1
        run = functools.partial(self.loop.decode, max_steps=max_steps, speculation=speculation)
        specs = OWN, OWN, COPY, COPY, COPY, COPY
        return self._on_union(run, specs, (OWN, COPY, COPY))(weights, cache, batch, sampling, numbers, leave_early)
