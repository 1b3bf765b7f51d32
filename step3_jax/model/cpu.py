"""A model as CPUs run it: weights as they are stored where the CPU kernels multiply with them, else widened to float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from step3_jax.cpu_kernels.api import unsupported
from step3_jax.cpu_kernels.loader import Kernels, Unavailable, find_kernels
from step3_jax.layers.attention import MFA
from step3_jax.layers.embed import Embedding
from step3_jax.layers.linear import Linear
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import STACKS, Experts, separate_experts
from step3_jax.layers.router import Router
from step3_jax.quant import BlockScaled, PackedInt4, dequantise

M = TypeVar("M", bound=nnx.Module)
_LOGGER = logging.getLogger(__name__)


def choose_dtype(asked: jax.typing.DTypeLike | None, quantization: str, *, is_apart: bool = False) -> jnp.dtype:
    """The dtype to load a model in that is to run on CPUs.

    It is float32, which the model runs in: one in bfloat16 would be widened after loading, while the first still takes its
    memory. It is bfloat16 where that is asked for and the CPU kernels multiply in it (see `find_model_kernels`).

    Args:
      asked: "float32", "bfloat16", or None for the default, which is float32.
      quantization: As `load_model` takes it.
      is_apart: Whether weights lie on several devices, for which products are in float32.
    """
    if asked is None or jnp.dtype(asked) != jnp.bfloat16:
        return jnp.dtype(jnp.float32)
    if is_apart or quantization == "none":
        obstacle = "weights lie on several devices" if is_apart else "weights are widened, as asked for"
    else:
        found = find_kernels()
        if isinstance(found, Kernels) and found.has_bfloat16:
            return jnp.dtype(jnp.bfloat16)
        why = found.reason if isinstance(found, Unavailable) else "the processor has no AVX512_BF16"
        obstacle = f"there are no CPU kernels for bfloat16: {why}"
    _LOGGER.warning("activations are float32, not bfloat16 (leave out --dtype bfloat16): %s", obstacle)
    return jnp.dtype(jnp.float32)


def find_model_kernels(dtype: jax.typing.DTypeLike) -> Kernels | None:
    """The CPU kernels for a model with activations of `dtype`, if there are any.

    All activations are held in float32. Of a bfloat16 model they are rounded for products with weights in bfloat16 and FP8,
    where the processor multiplies so.
    """
    found = find_kernels()
    return found.for_activations(dtype) if isinstance(found, Kernels) else None


def prepare_for_cpu(model: M, kernels: Kernels | None) -> M:
    """A module of its own that runs on a CPU; `model` stays whole, and arrays that stay are shared.

    Args:
      model: Of one device, its layers apart; or a part of one.
      kernels: Multiply with weights as they are stored; what they do not take, or everything without them, is widened to
        float32.
    """
    own = copy_module(model)
    use_kernels(own, kernels)
    separate_experts(own)
    return own


def copy_module(module: M) -> M:
    """A module of its own with the same arrays."""
    graphdef, state = nnx.split(module)
    # `merge` makes modules, but takes the parameters of `state` themselves.
    flat = [(path, variable.replace(variable.get_value())) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def use_kernels(module: nnx.Module, kernels: Kernels | None) -> None:
    """Makes a module run on a CPU, as `prepare_for_cpu`; it is changed in place."""
    kept: set[int] = set()
    for user, weights in _find_users(module):
        if isinstance(user, Linear | Experts | SwiGLU) and user.takes_rows:
            # It multiplies quantised activations with the weights as they are; the kernels take plain ones.
            kept |= {id(weight) for weight in weights}
        elif kernels is not None and all(unsupported(weight.get_value()) is None for weight in weights):
            user.cpu_kernels = kernels
            kept |= {id(weight) for weight in weights}
    for _, part in nnx.iter_modules(module):
        if isinstance(part, MFA):
            part.cpu_kernels = kernels
    for _, weight in nnx.iter_graph(module):
        if isinstance(weight, nnx.Param) and id(weight) not in kept:
            weight.set_value(_widen(weight.get_value()))


def widen(module: nnx.Module) -> None:
    """Makes the bfloat16 weights of a module float32; it is changed in place."""
    for _, weight in nnx.iter_graph(module):
        if isinstance(weight, nnx.Param) and isinstance(weight.get_value(), jax.Array):
            weight.set_value(_widen(weight.get_value()))


def _find_users(model: nnx.Module) -> Iterator[tuple[Linear | Embedding | Router | Experts | SwiGLU, list[nnx.Param]]]:
    """The modules that can use kernels, each with the weights that it multiplies with."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding | Router):
            yield module, [module.weight]
        elif isinstance(module, Experts):
            yield module, [getattr(module, name) for name in STACKS]
        elif isinstance(module, SwiGLU):
            yield module, [linear.weight for linear in (module.gate_proj, module.up_proj, module.down_proj)]


def _widen(weight: object) -> object:
    if isinstance(weight, BlockScaled | PackedInt4):
        return dequantise(weight)
    if isinstance(weight, jax.Array) and weight.dtype == jnp.bfloat16:
        return weight.astype(jnp.float32)
    return weight
