"""How the layers of a loaded model lie: a setting of loading, which means the same to what loads, counts and compiles it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from step3_jax.gpu import is_gpu
from step3_jax.model.fuse import fuse, separate, set_quantised
from step3_jax.model.step3 import Step3, stack_model, unstack_model


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """What is done to the decoder's layers when they are loaded. Nothing, unless a field says so.

    Attributes:
      stacks: Whether neighbouring layers of one form lie stacked and run in a loop, see `model.layers`.
      fuses: Whether products of one input are joined, see `model.fuse`.
      quantises: Whether activations are quantised before products with weights in FP8, see `model.fuse`.
    """

    stacks: bool = False
    fuses: bool = False
    quantises: bool = False

    @classmethod
    def of(cls, platform: str, dtype: jax.typing.DTypeLike) -> Arrangement:
        """By default all of it on GPUs, and none elsewhere.

        Args:
          platform: Of the devices, as `jax.Device.platform` names it.
          dtype: Of activations: wider ones than 16 bits are asked for by those who do not want them quantised.
        """
        is_fast = is_gpu(platform)
        return cls(is_fast, is_fast, is_fast and jnp.dtype(dtype).itemsize <= 2)


def arrange(model: Step3, arrangement: Arrangement) -> Step3:
    """A model like `model` with its layers so arranged; layers that are stacked already stay so.

    Args:
      model: With arrays, which are copied where they are stacked or joined, or with shapes.
      arrangement: What to do.
    """
    model = stack_model(model) if arrangement.stacks else nnx.merge(*nnx.split(model))
    if arrangement.fuses:
        fuse(model)
    set_quantised(model, wanted=arrangement.quantises)
    return model


def unstack(model: Step3) -> Step3:
    """A model like `model` as a checkpoint has it, for training: layers apart, products separate, nothing quantised anew."""
    model = unstack_model(model)
    separate(model)
    set_quantised(model, wanted=False)
    return model
