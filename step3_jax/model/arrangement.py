"""How the layers of a loaded model are arranged: a setting of loading, shared by loading, counting and compiling."""

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
    """What is done to the decoder's layers when they are loaded; by default nothing.

    Attributes:
      stacks: Whether neighbouring layers of the same structure are stacked and run in a loop, see `model.layers`.
      fuses: Whether products of the same input are joined, see `model.fuse`.
      quantises: Whether activations are quantised before products with weights in FP8, see `model.fuse`.
      has_plain_ffn: Whether the FFN halves are left out of that.
    """

    stacks: bool = False
    fuses: bool = False
    quantises: bool = False
    has_plain_ffn: bool = False

    @classmethod
    def of(cls, platform: str, dtype: jax.typing.DTypeLike, *, ffn_platform: str | None = None) -> Arrangement:
        """The default: everything on GPUs, and nothing elsewhere.

        With the FFN halves on a CPU beside a GPU, layers stay apart, since the CPU kernels read them one by one; these take
        float32, so that only attention's activations are quantised.

        Args:
          platform: The devices' platform, named as by `jax.Device.platform`.
          dtype: The dtype of activations: if wider than 16 bits, they are not quantised.
          ffn_platform: That of the devices that hold the FFN halves; None for the same.
        """
        is_fast = is_gpu(platform)
        quantises = is_fast and jnp.dtype(dtype).itemsize <= 2
        if is_fast and ffn_platform == "cpu":
            return cls(quantises=quantises, has_plain_ffn=True)
        return cls(is_fast, is_fast, quantises)


def arrange(model: Step3, arrangement: Arrangement) -> Step3:
    """A model like `model` with its layers arranged so; layers that are stacked already stay stacked.

    Args:
      model: A model with arrays, which are copied where they are stacked or joined, or with shapes.
      arrangement: What to do.
    """
    model = stack_model(model) if arrangement.stacks else nnx.merge(*nnx.split(model))
    if arrangement.fuses:
        fuse(model)
    set_quantised(model, wanted=arrangement.quantises, has_plain_ffn=arrangement.has_plain_ffn)
    return model


def unstack(model: Step3) -> Step3:
    """A model like `model` in the checkpoint's form: layers apart, products separate, activations unquantised.

    It has the parameters of a checkpoint, by their paths there: for saving and for comparing. Of stacked layers each weight
    is a place in its stack (`stack.LayerOf`), and nothing is copied but the parts of joined products. Training, which needs
    arrays, loads a model with `Arrangement()`.
    """
    model = nnx.merge(*nnx.split(model))
    separate(model)
    set_quantised(model, wanted=False)
    return unstack_model(model)
