"""A model as CPUs run it: weights as they are stored where the CPU kernels multiply with them, else widened to float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from step3_jax.cpu_kernels.api import unsupported
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.embed import Embedding
from step3_jax.layers.linear import Linear
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import STACKS, Experts, separate_experts
from step3_jax.layers.router import Router
from step3_jax.quant import BlockScaled, PackedInt4, dequantise

M = TypeVar("M", bound=nnx.Module)


def prepare_for_cpu(model: M, kernels: Kernels | None) -> M:
    """A module of its own that runs on a CPU in float32; `model` stays whole, and arrays that stay are shared.

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
    """Makes a module run on a CPU in float32, as `prepare_for_cpu`; it is changed in place."""
    kept: set[int] = set()
    for user, weights in _find_users(module):
        if isinstance(user, Linear | Experts | SwiGLU) and user.takes_rows:
            # It multiplies quantised activations with the weights as they are; the kernels take plain ones.
            kept |= {id(weight) for weight in weights}
        elif kernels is not None and all(unsupported(weight.get_value()) is None for weight in weights):
            user.cpu_kernels = kernels
            kept |= {id(weight) for weight in weights}
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
