"""The models of the benchmarks: Step3's proportions at any size, with random weights."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from step3_jax.checkpoint.names import is_fp8_tensor, is_linear_tensor, parameters_of, released_name
from step3_jax.config import ModelConfig, TextConfig
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.layout.weight_form import GROUP_COLUMNS, form_bytes
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.quant import Form, quantise

# Weights widened to float32, and unchanged.
PLAIN_FORMS = ("none", "stored")


def bench_config(hidden_size: int, num_layers: int) -> ModelConfig:
    """A text-only model with Step3's proportions: one dense layer, then layers of 16 experts, 3 of them chosen.

    Raises:
      ValueError: If `hidden_size` is not a multiple of 128, or there is not at least one layer.
    """
    if hidden_size < 128 or hidden_size % 128:
        raise ValueError(f"--hidden is {hidden_size}; a multiple of 128 is needed")
    if num_layers < 1:
        raise ValueError(f"--layers is {num_layers}; at least 1 is needed")
    text = TextConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        head_dim=128,
        share_q_dim=hidden_size // 2,
        moe_num_experts=16,
        moe_top_k=3,
        moe_intermediate_size=hidden_size * 3 // 4,
        share_expert_dim=hidden_size * 3 // 4,
        moe_layers=tuple(range(1, num_layers)),
        vocab_size=16 * hidden_size,
        max_position_embeddings=4096,
    )
    return ModelConfig(text=text, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)


def random_model(config: ModelConfig) -> Step3:
    """A float32 model with normal weights of standard deviation fan_in^-0.5, and norms of ones."""
    graphdef, state = nnx.split(abstract_step3(config, "float32"))
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(leaf.shape[-1] ** -0.5)
        return jnp.asarray(values)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def hold_as(model: Step3, form: str) -> Step3:
    """A copy of the model with its weights as one of `PLAIN_FORMS` or quantised; unchanged arrays are shared.

    The weights that the release has in FP8 are quantised; embedding and head are then in bfloat16, as there.
    """
    graphdef, state = nnx.split(model)
    own = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if form == "none" else leaf, state))
    if form not in PLAIN_FORMS:
        for (path, target), source in zip(parameters_of(own).items(), parameters_of(model).values(), strict=True):
            name = released_name(path)
            if is_fp8_tensor(name):
                target.set_value(_QUANTISE(source.get_value(), cast(Form, form)))
            elif is_linear_tensor(name):
                target.set_value(source.get_value().astype(jnp.bfloat16))
    return own


def weight_sizes(dtype: str, form: str) -> tuple[float, float]:
    """Bytes per weight, including scales: for the layers, and for the head.

    On a CPU without kernels all are widened to float32.
    """
    if jax.default_backend() == "cpu" and (form == "none" or not isinstance(find_kernels(), Kernels)):
        dtype, form = "float32", "none"
    if form in PLAIN_FORMS:
        return (jnp.dtype(dtype).itemsize,) * 2
    return form_bytes((GROUP_COLUMNS, GROUP_COLUMNS), form) / GROUP_COLUMNS**2, jnp.dtype(jnp.bfloat16).itemsize


_QUANTISE = jax.jit(quantise, static_argnums=1)
