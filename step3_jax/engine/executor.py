"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Array, Bool, Float

from step3_jax.config import ModelConfig
from step3_jax.engine.state import DecodeState, PrefillBatch, Report
from step3_jax.sampling.batch import SamplingBatch, SamplingMode


class Executor(Protocol):
    """Runs a model's calls over pytrees. `runner.Runner` does on one device; others may spread a model over many.

    Attributes:
      config: The model's sizes.
      compile_s: Seconds spent tracing and compiling so far.
    """

    config: ModelConfig
    compile_s: float

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """Features of views, or of windows: one size a call."""
        ...

    def prefill(
        self, batch: PrefillBatch, sampling: SamplingBatch, *, cache_length: int, mode: SamplingMode
    ) -> tuple[DecodeState, Report]:
        """Reads the prompts and chooses the first tokens.

        Args:
          batch: The prompts.
          sampling: Parameters of the rows.
          cache_length: Tokens of prompt and output that the cache has room for.
          mode: What may be left out.

        Returns:
          The state for `decode`, and a report that stays valid after it.
        """
        ...

    def decode(
        self,
        state: DecodeState,
        sampling: SamplingBatch,
        is_halted: Bool[np.ndarray, " B"],
        num_steps: int,
        *,
        mode: SamplingMode,
    ) -> tuple[DecodeState, Report]:
        """Makes up to `num_steps` more tokens of each row.

        Args:
          state: Of the last call; it is consumed.
          sampling: Parameters of the rows, as in `prefill`.
          is_halted: Rows that the host ends.
          num_steps: Steps to take at most.
          mode: As in `prefill`.

        Returns:
          As `prefill`.
        """
        ...
