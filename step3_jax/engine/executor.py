"""What the engine asks of whatever runs the model: five calls over pytrees."""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.pages import Storage
from step3_jax.cache.paged import Cache
from step3_jax.config import ModelConfig
from step3_jax.engine.state import DecodeCall, PrefillBatch, Report


class Executor(Protocol):
    """Runs a model's calls. `runner.Runner` does on one device; others may spread a model over many.

    The cache is the executor's own: the engine only hands it back at each call, which consumes it, and decides which
    pages belong to whom. Between calls an executor remembers nothing of a sequence.

    Attributes:
      config: The model's sizes.
      dtype: Of activations, and of the cache unless another is asked for.
      num_shards: Shards that the cache and the batch are in. Page numbers count through: those of one shard stand behind
        the other's. A batch has equally many rows of each shard, and a row's pages are of its own shard.
      compile_s: Seconds spent tracing and compiling so far.
    """

    config: ModelConfig
    dtype: jnp.dtype
    num_shards: int
    compile_s: float

    def cache_memory_bytes(self) -> int | None:
        """Memory that is left for each shard of the cache; None where devices do not say."""
        ...

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """Empty pages of all layers, to be handed to `prefill` and `decode`."""
        ...

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """Features of views, or of windows: one size a call."""
        ...

    def prefill(self, cache: Cache, batch: PrefillBatch) -> Cache:
        """Reads a chunk of prompts into the cache.

        Args:
          cache: Of the last call; it is consumed.
          batch: The chunk.

        Returns:
          The cache with the chunk's rows. No logits: a prompt's last token is read by `decode`.
        """
        ...

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Report]:
        """Makes up to `call.num_steps` tokens of each active row.

        Args:
          cache: Of the last call; it is consumed.
          call: What to do.

        Returns:
          The cache, and a report that stays valid after the next call.
        """
        ...
