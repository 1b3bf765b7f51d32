"""The jitted calls on many devices: the same functions as on one, under `jax.shard_map`."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.pages import Storage
from step3_jax.cache.paged import Cache, empty_cache
from step3_jax.engine.runner import Runner, widen_weights
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch, Report
from step3_jax.gpu import compiler_options, memory_left
from step3_jax.mesh import Layout, agree_least
from step3_jax.model.parallel import parallelise
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingMode

Batch = TypeVar("Batch", PrefillBatch, DecodeBatch)


class ShardedRunner(Runner):
    """Runs a model that is spread over the devices of a layout; an `executor.Executor`.

    Each device runs the single-device program on its own rows and pages; what the layers exchange is in
    `model.parallel`. Of several processes each calls with the same arguments, and gets the same report.

    Attributes:
      layout: The devices.
    """

    def __init__(self, model: Step3, layout: Layout) -> None:
        """Takes a model whose weights lie as `layout.parameter` says (`load_model` and `place_model` put them so).

        The weights may be abstract, for `prefill_program` and `decode_program`. On a CPU a bfloat16 model is held and run
        in float32, as `Runner` does.
        """
        self._set_up(model)
        self.layout = layout
        self.num_shards = layout.size("rows")
        if jax.default_backend() == "cpu" and layout.mesh.devices.flat[0].platform == "cpu":
            model = widen_weights(model)
        self.dtype = model.text.embed_tokens.weight.get_value().dtype
        self._split(parallelise(model, layout))
        rows, copies = layout.sharding("rows"), layout.sharding()
        weights = [weight.sharding for weight in self._weights]
        self._copies = copies
        self._rows_axes = layout.axes("rows")
        self._sampling: tuple[SamplingBatch, SamplingBatch] | None = None
        jit = functools.partial(jax.jit, compiler_options=compiler_options(layout.mesh.devices.flat[0].platform))
        self._prefill = jit(
            self._prefill_shards, in_shardings=(weights, rows, copies), out_shardings=rows, donate_argnums=1
        )
        self._decode_calls = jit(
            self._decode_shards,
            static_argnums=(6, 7),
            in_shardings=(weights, rows, copies, copies, copies, copies),
            out_shardings=(rows, copies),
            donate_argnums=1,
        )
        self._encode = jit(self._encode_shards, in_shardings=(weights, layout.sharding("images")), out_shardings=copies)

    def cache_memory_bytes(self) -> int | None:
        """See `Executor.cache_memory_bytes`."""
        left = memory_left(self.layout.mesh.local_devices)
        return None if left is None else agree_least(left)

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`."""
        as_bits = jax.default_backend() == "cpu"
        make = functools.partial(empty_cache, self.config.text, num_pages, storage, as_bits=as_bits)
        return jax.jit(make, out_shardings=self.layout.sharding("rows"))()

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """See `Executor.encode_images`; the squares are shared out over all devices."""
        count, sharding = pixels.shape[0], self.layout.sharding("images")
        missing = -count % self.layout.size("images")
        padded = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        placed = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
        return self._timed("encode_images", self._encode, self._weights, placed)[:count]

    def prefill(self, cache: Cache, batch: PrefillBatch) -> Cache:
        """See `Executor.prefill`."""
        return self._timed("prefill", self._prefill, self._weights, cache, self._on_host(batch))

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Report]:
        """See `Executor.decode`."""
        if self._sampling is None or self._sampling[0] is not call.sampling:
            # The engine gives the same parameters again until a row comes or goes.
            self._sampling = call.sampling, self._place(call.sampling)
        given = self._on_host(call.batch), self._sampling[1], np.int32(call.num_steps), np.bool_(call.leave_early)
        return self._timed("decode", self._decode_calls, self._weights, cache, *given, call.max_steps, call.mode)

    def decode_program(
        self, cache: Cache, batch: DecodeBatch, sampling: SamplingBatch, *, max_steps: int, mode: SamplingMode
    ) -> jax.stages.Compiled:
        """See `Runner.decode_program`."""
        given = batch, sampling, np.int32(1), np.bool_(False)
        return self._decode_calls.lower(self._weights, cache, *given, max_steps, mode).compile()

    def _on_host(self, batch: Batch) -> Batch:
        """Arrays of one device as numpy's, which every process may give to a call over all devices."""
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else np.asarray(leaf), batch)

    def _place(self, sampling: SamplingBatch) -> SamplingBatch:
        """A copy on every device."""

        def place(leaf: Array) -> Array:
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, self._copies, host.__getitem__)

        return jax.tree.map(place, sampling)

    # The functions below are traced. A batch comes whole to every device, which takes its own rows.

    def _prefill_shards(self, weights: list[Array], cache: Cache, batch: PrefillBatch) -> Cache:
        rows = self.layout.spec("rows")
        specs = jax.tree.map(lambda _: rows, batch)
        if batch.features is not None:
            specs = specs._replace(features=PartitionSpec())
        return jax.shard_map(
            self._run_prefill,
            mesh=self.layout.mesh,
            in_specs=(self._specs(), rows, specs),
            out_specs=rows,
            check_vma=False,
        )(weights, cache, self._with_local_pages(cache, batch))

    def _decode_shards(
        self,
        weights: list[Array],
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        max_steps: int,
        mode: SamplingMode,
    ) -> tuple[Cache, Report]:
        rows, copy = self.layout.spec("rows"), PartitionSpec()

        return jax.shard_map(
            functools.partial(self._decode_own, max_steps=max_steps, mode=mode),
            mesh=self.layout.mesh,
            in_specs=(self._specs(), rows, rows, rows, copy, copy),
            out_specs=(rows, copy),
            check_vma=False,
        )(weights, cache, self._with_local_pages(cache, batch), sampling, num_steps, leave_early)

    def _decode_own(
        self,
        weights: list[Array],
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        *,
        max_steps: int,
        mode: SamplingMode,
    ) -> tuple[Cache, Report]:
        cache, report = self._run_decode(
            weights, cache, batch, sampling, num_steps, leave_early, max_steps=max_steps, mode=mode
        )
        # Every process reads all of it.
        return cache, jax.tree.map(self._gather_rows, report)

    def _encode_shards(
        self, weights: list[Array], pixels: Float[Array, "images 3 S S"]
    ) -> Float[Array, "images tokens D"]:
        images = self.layout.spec("images")
        return jax.shard_map(
            self._run_encode,
            mesh=self.layout.mesh,
            in_specs=(self._specs(), images),
            out_specs=images,
            check_vma=False,
        )(weights, pixels)

    def _specs(self) -> list[PartitionSpec]:
        return [weight.sharding.spec for weight in self._weights]

    def _with_local_pages(self, cache: Cache, batch: Batch) -> Batch:
        """Page numbers as each shard counts its own."""
        return batch._replace(table=batch.table % (cache[0].keys.shape[0] // self.num_shards))

    def _gather_rows(self, own: Array) -> Array:
        return jax.lax.all_gather(own, self._rows_axes, axis=0, tiled=True) if self._rows_axes else own

    def _any_row(self, holds: Bool[Array, " B"]) -> Bool[Array, ""]:
        held = jnp.any(holds)
        return jax.lax.pmax(held.astype(jnp.int32), self._rows_axes) > 0 if self._rows_axes else held
