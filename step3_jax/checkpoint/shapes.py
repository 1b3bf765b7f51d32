"""The model that `load_model` reads, as shapes: for compiling and counting without any weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from step3_jax.checkpoint.names import is_fp8_tensor, parameters_of, released_name
from step3_jax.config import ModelConfig
from step3_jax.layout.tensor import scale_shape
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.quant import FP8, BlockScaled


def abstract_model(config: ModelConfig) -> Step3:
    """The module with shapes for arrays, unstacked; `model.arrangement.arrange` does what loading does to them.

    Args:
      config: Its `dtype` is for weights and activations; with `quantization` the decoder's linear weights are FP8.
    """
    model = abstract_step3(config)
    if config.quantization is not None:
        block = config.quantization.weight_block_size
        for path, variable in parameters_of(model).items():
            if is_fp8_tensor(released_name(path)):
                variable.set_value(_quantised(variable.get_value().shape, block))
    return model


def _quantised(shape: tuple[int, ...], block: tuple[int, int]) -> BlockScaled:
    return jax.eval_shape(
        lambda: BlockScaled(jnp.zeros(shape, FP8), jnp.zeros(scale_shape(shape, block), jnp.float32), block)
    )
