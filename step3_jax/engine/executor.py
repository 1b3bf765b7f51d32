"""The interface between the engine and what runs the model: plain data in and out, and a cache that it only passes back."""

from __future__ import annotations

import abc
import collections
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.storage import Storage
from step3_jax.cache.paged import Cache
from step3_jax.config import ModelConfig
from step3_jax.engine.bucket_table import PAGE_COPIES, power_of_two
from step3_jax.engine.history import DeviceHistory
from step3_jax.engine.state import DecodeBatch, DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.gpu import compiler_options, memory_left
from step3_jax.layout.parallel import BOTH, Parallel
from step3_jax.layout.role import Role
from step3_jax.layout.workspace import estimate_workspace
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


class Started(Generic[T_co]):
    """A call that was dispatched and may still run."""

    def __init__(self, value: T_co) -> None:
        """Takes what the call returned: a pytree of arrays."""
        self._value = value

    def result(self) -> T_co:
        """Waits for the call; returns its values on the host.

        Raises:
          Exception: Whatever the call failed with.
        """
        return jax.device_get(self._value)

    def wait(self) -> None:
        """Waits for the call, and leaves its values where they are.

        Raises:
          Exception: Whatever the call failed with.
        """
        jax.block_until_ready(self._value)

    @property
    def is_ready(self) -> bool:
        """Whether it has ended."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self._value) if hasattr(leaf, "is_ready"))


class ModelPart:
    """Base of every process that holds a model, or a part of one.

    Attributes:
      config: The model's sizes.
      devices: The devices of this process that run the model; all are of the first one's kind.
      dtype: The dtype of activations, and of the cache unless another is given. A CPU computes in float32: XLA:CPU decodes
        one sequence faster in it than in bfloat16, though it reads twice the bytes (see benchmarks/README.md).
      num_shards: Shards of the cache and the batch. Pages are numbered consecutively, one shard after the
        other. A batch has equally many sequences of each shard, and a sequence's pages are in its own shard.
      num_image_shards: Shards that the squares of a vision tower call are divided into, evenly; one if all devices
        encode each square together. `num_shards` if not given.
      compile_s: Seconds spent in calls that had to trace, up to their dispatch.
      num_traces: How often each call was traced, by name.
    """

    def __init__(
        self,
        config: ModelConfig,
        devices: Sequence[jax.Device],
        dtype: jnp.dtype,
        num_shards: int,
        num_image_shards: int | None = None,
    ) -> None:
        self.config = config
        self.devices = tuple(devices)
        self.dtype = self.run_dtype(dtype)
        self.num_shards = num_shards
        self.num_image_shards = num_shards if num_image_shards is None else num_image_shards
        self.compile_s = 0.0
        self.num_traces: collections.Counter[str] = collections.Counter()
        self._jit = functools.partial(jax.jit, compiler_options=compiler_options(self.devices[0].platform))

    @property
    def is_cpu(self) -> bool:
        """Whether the model runs on CPUs."""
        return self.devices[0].platform == "cpu"

    @property
    def num_processes(self) -> int:
        """Processes that make each call together."""
        return 1

    def run_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype in which weights or activations of `dtype` are held: one rule for all executors."""
        return jnp.dtype(jnp.float32) if self.is_cpu and dtype == jnp.bfloat16 else jnp.dtype(dtype)


class Executor(ModelPart, abc.ABC):
    """Runs a model's calls; the base of all executors.

    `runner.Runner` runs them on one device; others shard a model over several. The engine decides which pages belong to
    which sequence and hands the cache back at each call, which consumes it. Between calls an executor remembers only the
    tokens of sequences (`DeviceHistory`), and only if they are looked up.
    """

    def __init__(
        self,
        config: ModelConfig,
        devices: Sequence[jax.Device],
        dtype: jnp.dtype,
        num_shards: int,
        num_image_shards: int | None = None,
    ) -> None:
        super().__init__(config, devices, dtype, num_shards, num_image_shards)
        self._placed: tuple[SamplingBatch, SamplingBatch] | None = None
        self._placed_wide: dict[str, tuple[object, Array]] = {}

    @functools.cached_property
    def _history(self) -> DeviceHistory:
        return DeviceHistory(self._jit, self._everywhere)

    @property
    def _everywhere(self) -> jax.sharding.Sharding | None:
        """The sharding of an array that every device has in full; None for the default device."""
        return None

    @property
    def role(self) -> Role:
        """The part of the model on the devices that hold the cache, and how many of these devices there are."""
        return Role(BOTH, 1, Parallel(ep=1))

    @property
    def num_microbatches(self) -> int:
        """Micro-batches in flight between attention and FFN; 0 where every device does both."""
        return 0

    @property
    def afd_wait_s(self) -> float | None:
        """Seconds that attention devices spent only waiting for FFN devices; None where that is not known.

        It is known where a host dispatches each step. Where one program runs many steps (AFD's executor
        `program`), the host sees only the whole call's time.
        """
        return None

    def check(self) -> None:
        """Raises RunLostError if no more calls can be made because one of several processes is lost."""

    def close(self) -> None:
        """Lets the other processes of a run leave; does nothing where there are none."""

    def cache_memory_bytes(
        self, rows: int, chunk_tokens: int, step_tokens: int = 1, history_tokens: int = 0
    ) -> int | None:
        """Memory left for each shard of the cache, by the rule of `step3 plan memory`; None if devices do not report it.

        Args:
          rows: Sequences of a shard that decode at once.
          chunk_tokens: Prompt tokens of a shard that are prefilled at once.
          step_tokens: Tokens of each sequence in a decode step; more than one where tokens are guessed.
          history_tokens: Tokens that the sequences of a shard have room for, all together.
        """
        workspace = estimate_workspace(
            self.config,
            self.dtype.name if self.config.quantization is None else "fp8",
            self.role,
            rows=-(-rows // max(self.num_microbatches, 1)),
            chunk_tokens=chunk_tokens,
            num_microbatches=self.num_microbatches,
            step_tokens=step_tokens,
            history_tokens=history_tokens,
        )
        return memory_left(self.devices, workspace.total)

    @abc.abstractmethod
    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """Empty pages of all layers, to be passed to `prefill` and `decode`."""

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[np.ndarray, "images tokens D"]:
        """Features of views, or of windows: one size per call.

        Raises:
          ValueError: If the model has no vision tower.
        """
        count = pixels.shape[0]
        padded = np.pad(pixels, ((0, -count % self.num_image_shards), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._encode_images(padded))[:count]

    @abc.abstractmethod
    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """Computes the keys and values of a chunk of prompts.

        Args:
          cache: From the last call; it is consumed.
          batch: The chunk.

        Returns:
          The cache with the chunk's tokens, and the call, which counts the tokens per expert. No logits: a prompt's
          last token is left to `decode`.
        """

    @abc.abstractmethod
    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """Generates up to `call.num_steps` tokens of each active sequence.

        Args:
          cache: From the last call; it is consumed.
          call: What to do.

        Returns:
          The cache, and the call, whose report stays valid after the next call.
        """

    @abc.abstractmethod
    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """Copies pages inside their shards, in all layers.

        Args:
          cache: From the last call; it is consumed.
          sources: Pages to copy, at most `PAGE_COPIES` per shard for the program that is compiled ahead.
          targets: Where each goes: distinct pages, none of them a source.
        """

    def wait(self, cache: Cache) -> Cache:
        """Waits until all calls that the cache has gone through have ended; returns the cache."""
        return jax.block_until_ready(cache)

    def lower(self, cache: Cache, call: PrefillBatch | DecodeCall) -> jax.stages.Lowered | None:
        """Traces a call's program, to be compiled in parallel with others; the call itself then finds it.

        Args:
          cache: As for the call; it is not consumed.
          call: The call that would be made.

        Returns:
          None if only the call itself makes the program.
        """
        return None

    @abc.abstractmethod
    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """`encode_images`, for a multiple of `num_image_shards` images."""

    def _timed(self, name: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Makes a call; its time counts as compiling if it traced anything. Each traced function counts its traces."""
        num_traces, start = self.num_traces[name], time.perf_counter()
        result = call(*args, **kwargs)
        if self.num_traces[name] != num_traces:
            self.compile_s += time.perf_counter() - start
        return result

    def _place_call(self, call: DecodeCall) -> tuple[DecodeBatch, SamplingBatch, np.int32, np.bool_]:
        """The arguments of a runner's decode loop, except the static ones."""
        sampling = self._place_sampling(call.sampling)
        return self._place_wide(call), sampling, np.int32(call.num_steps), np.bool_(call.leave_early)

    def _place_sampling(self, sampling: SamplingBatch) -> SamplingBatch:
        """Sampling parameters on the devices; the engine passes the same ones until a sequence joins or leaves."""
        if self._placed is None or self._placed[0] is not sampling:
            self._placed = sampling, jax.tree.map(self._place, sampling)
        return self._placed[1]

    def _place_wide(self, call: DecodeCall) -> DecodeBatch:
        """A call's batch with its wide arrays on the devices, where an array stays as long as calls pass the same one."""
        batch = call.batch
        for name in ("history", "mask"):
            array = getattr(batch, name)
            if array is None:
                continue
            if self._placed_wide.get(name, (None,))[0] is not array:
                self._placed_wide[name] = array, jax.tree.map(self._place, array)
            batch = batch._replace(**{name: self._placed_wide[name][1]})
        return batch if call.history is None else batch._replace(history=self._history.write(call.history))

    def _place(self, array: np.ndarray) -> Array:
        """A host array as the calls take it: replicated on every device of the model, or sharded by rows."""
        return jax.device_put(array)


def num_copies(pages: Sequence[int]) -> int:
    """Pages per shard that the program for this many copies takes."""
    return max(PAGE_COPIES, power_of_two(len(pages)))


def own_devices(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """The devices of this process; all of them where it has none, as when a program is compiled for other machines."""
    every = list(devices)
    return [device for device in every if device.process_index == jax.process_index()] or every


def widen_weights(model: Step3) -> Step3:
    """A copy of the module that computes in float32, so that `model` stays unchanged.

    The weights of a bfloat16 model become float32; bfloat16 weights with float32 activations are intended and stay so, and
    everything that need not change is shared.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(_widen, state) if model.text.dtype == jnp.bfloat16 else state)


def local_pages(pages: Iterable[int], shard_pages: int, num_shards: int, size: int) -> np.ndarray:
    """Shard-local page numbers, grouped by shard and padded with a number that no shard has.

    Args:
      pages: Page numbers, consecutive over all shards.
      shard_pages: Pages of a shard.
      num_shards: Shards.
      size: Numbers per shard in the result.

    Returns:
      int32 [num_shards * size].
    """
    found = np.full((num_shards, size), shard_pages, np.int32)
    filled: collections.Counter[int] = collections.Counter()
    for page in pages:
        shard = page // shard_pages
        found[shard, filled[shard]] = page % shard_pages
        filled[shard] += 1
    return found.reshape(-1)


def _widen(weight: Array) -> Array:
    return weight.astype(jnp.float32) if weight.dtype == jnp.bfloat16 else weight
