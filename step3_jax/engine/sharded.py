"""The jitted calls on many devices: the same functions as on one, under `jax.shard_map`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.storage import Storage
from step3_jax.cache.paged import Cache, count_pages, empty_cache
from step3_jax.engine.executor import Executor, Started, local_pages, num_copies, own_devices, widen_weights
from step3_jax.engine.runner import SplitModel, TracedCalls, Weights
from step3_jax.engine.state import DecodeBatch, DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.layout.parallel import BOTH
from step3_jax.layout.role import Role
from step3_jax.mesh import Layout
from step3_jax.model.parallel import parallelise
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

Batch = TypeVar("Batch", PrefillBatch, DecodeBatch)


class ShardedRunner(Executor):
    """Runs a model that is spread over the devices of a layout.

    Each device runs the single-device program on its own sequences and pages; what the layers exchange is in
    `model.parallel`. Every process makes the same calls in the same order (`engine/drive`), and gets the same
    report.

    Attributes:
      layout: The devices.
    """

    def __init__(self, model: Step3, layout: Layout) -> None:
        """Takes a model whose weights are placed as `layout.parameter` says (`load_model` and `place_model` do that).

        The weights may be abstract, for `prefill_program` and `decode_program`. On a CPU a bfloat16 model is held in
        float32, see `Executor.dtype`.
        """
        super().__init__(
            model.config,
            own_devices(layout.mesh.devices.flat),
            model.text.dtype,
            num_shards=layout.size("rows"),
            num_image_shards=layout.size("images"),
        )
        self.layout = layout
        # Abstract weights stand for a GPU program, whose bytes must be unchanged.
        is_abstract = isinstance(model.text.embed_tokens.weight.get_value(), jax.ShapeDtypeStruct)
        if self.is_cpu and not is_abstract:
            model = widen_weights(model)
        self._split = SplitModel(parallelise(model, layout))
        self._traced = TracedCalls(self._split.build, self.num_traces, self.config.text, any_row=self._any_row)
        rows, copies = layout.sharding("rows"), layout.sharding()
        weights = [weight.sharding for weight in self._split.weights]
        self._copies = copies
        self._rows_axes = layout.axes("rows")
        self._prefill = self._jit(
            self._prefill_shards, in_shardings=(weights, rows, copies), out_shardings=(rows, copies), donate_argnums=1
        )
        self._decode_calls = self._jit(
            self._decode_shards,
            static_argnums=(6, 7),
            in_shardings=(weights, rows, copies, copies, copies, copies),
            out_shardings=(rows, copies),
            donate_argnums=1,
        )
        self._encode = self._jit(
            self._encode_shards, in_shardings=(weights, layout.sharding("images")), out_shardings=copies
        )
        spec = layout.spec("rows")
        self._copy = self._jit(
            jax.shard_map(self._traced.copy_pages, mesh=layout.mesh, in_specs=spec, out_specs=spec, check_vma=False),
            # Replicated on every device, as each process has all of them; `shard_map` gives each device its own.
            in_shardings=(rows, copies, copies),
            out_shardings=rows,
            donate_argnums=0,
        )

    @property
    def num_processes(self) -> int:
        """See `Executor.num_processes`."""
        return len({device.process_index for device in self.layout.mesh.devices.flat})

    @property
    def role(self) -> Role:
        """See `Executor.role`."""
        return Role(BOTH, self.layout.parallel.num_devices, self.layout.parallel)

    @property
    def _everywhere(self) -> NamedSharding:
        return self._copies

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`."""
        make = functools.partial(empty_cache, self.config.text, num_pages, storage, as_bits=self.is_cpu)
        return jax.jit(make, out_shardings=self.layout.sharding("rows"))()

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        placed = jax.make_array_from_callback(pixels.shape, self.layout.sharding("images"), pixels.__getitem__)
        return self._timed("encode_images", self._encode, self._split.weights, placed)

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`."""
        cache, counts = self._timed("prefill", self._prefill, self._split.weights, cache, batch)
        return cache, Started(counts)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`."""
        given = self._place_call(call)
        static = call.max_steps, call.speculation
        cache, report = self._timed("decode", self._decode_calls, self._split.weights, cache, *given, *static)
        return cache, Started(call.cut_report(report))

    def lower(self, cache: Cache, call: PrefillBatch | DecodeCall) -> jax.stages.Lowered | None:
        """See `Executor.lower`. Several processes compile their programs together, by calling them in one order."""
        if jax.process_count() > 1:
            return None
        if isinstance(call, PrefillBatch):
            return self._timed("prefill", self._prefill.lower, self._split.weights, cache, call)
        given = self._place_call(call)
        static = call.max_steps, call.speculation
        return self._timed("decode", self._decode_calls.lower, self._split.weights, cache, *given, *static)

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`."""
        shard_pages, size = self._pages_of_shard(cache), num_copies(sources)
        own = (local_pages(pages, shard_pages, self.num_shards, size) for pages in (sources, targets))
        return self._timed("copy_pages", self._copy, cache, *own)

    def prefill_program(self, cache: Cache, batch: PrefillBatch) -> jax.stages.Compiled:
        """See `Runner.prefill_program`."""
        return self._prefill.lower(self._split.weights, cache, batch).compile()

    def decode_program(
        self,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> jax.stages.Compiled:
        """See `Runner.decode_program`."""
        return self.lower_decode(cache, batch, sampling, max_steps=max_steps, speculation=speculation).compile()

    def lower_decode(
        self,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> jax.stages.Lowered:
        """The decode loop of a bucket before it is compiled; the arguments may be abstract, and are not consumed."""
        given = batch, sampling, np.int32(1), np.bool_(False)
        return self._decode_calls.lower(self._split.weights, cache, *given, max_steps, speculation)

    def encode_program(self, pixels: Float[Array, "images 3 S S"]) -> jax.stages.Compiled:
        """The compiled vision tower for this many images, for reading; the pixels may be abstract."""
        return self._encode.lower(self._split.weights, pixels).compile()

    def _place(self, array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, self._copies, array.__getitem__)

    # The functions below are traced. Every device gets the whole batch, and takes its own rows.

    def _prefill_shards(
        self, weights: Weights, cache: Cache, batch: PrefillBatch
    ) -> tuple[Cache, Int[Array, "shards layers E"]]:
        rows = self.layout.spec("rows")
        specs = jax.tree.map(lambda _: rows, batch)
        if batch.features is not None:
            specs = specs._replace(features=PartitionSpec())
        return jax.shard_map(
            self._traced.prefill,
            mesh=self.layout.mesh,
            in_specs=(self._specs(), rows, specs),
            out_specs=rows,
            check_vma=False,
        )(weights, cache, self._with_local_pages(cache, batch))

    def _decode_shards(
        self,
        weights: Weights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        max_steps: int,
        speculation: Speculation | None,
    ) -> tuple[Cache, Report]:
        rows, copy = self.layout.spec("rows"), PartitionSpec()

        return jax.shard_map(
            functools.partial(self._decode_own, max_steps=max_steps, speculation=speculation),
            mesh=self.layout.mesh,
            in_specs=(self._specs(), rows, rows, rows, copy, copy),
            out_specs=(rows, copy),
            check_vma=False,
        )(weights, cache, self._with_local_pages(cache, batch), sampling, num_steps, leave_early)

    def _decode_own(
        self,
        weights: Weights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        *,
        max_steps: int,
        speculation: Speculation | None,
    ) -> tuple[Cache, Report]:
        given = batch, sampling, num_steps, leave_early
        cache, report = self._traced.decode(weights, cache, *given, max_steps=max_steps, speculation=speculation)
        # Every process reads all of it.
        return cache, jax.tree.map(self._gather_rows, report)

    def _encode_shards(self, weights: Weights, pixels: Float[Array, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        images = self.layout.spec("images")
        return jax.shard_map(
            self._traced.encode,
            mesh=self.layout.mesh,
            in_specs=(self._specs(), images),
            out_specs=images,
            check_vma=False,
        )(weights, pixels)

    def _specs(self) -> list[PartitionSpec]:
        return [weight.sharding.spec for weight in self._split.weights]  # type: ignore[attr-defined]

    def _with_local_pages(self, cache: Cache, batch: Batch) -> Batch:
        """Shard-local page numbers."""
        return batch._replace(table=batch.table % self._pages_of_shard(cache))

    def _pages_of_shard(self, cache: Cache) -> int:
        """Pages per layer in a shard."""
        return count_pages(cache, self.config.text.num_hidden_layers) // self.num_shards

    def _gather_rows(self, own: Array) -> Array:
        return jax.lax.all_gather(own, self._rows_axes, axis=0, tiled=True) if self._rows_axes else own

    def _any_row(self, holds: Bool[Array, " B"]) -> Bool[Array, ""]:
        held = jnp.any(holds)
        return jax.lax.pmax(held.astype(jnp.int32), self._rows_axes) > 0 if self._rows_axes else held
