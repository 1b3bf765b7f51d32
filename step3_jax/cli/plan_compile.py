"""The decode programs of a deployment, compiled from shapes alone: no weights, no accelerator.

Each role's whole decode step of all layers is compiled for as many CPU devices as it has, its arguments placed by the
rules that the running system uses (`model/parallel.py`, `afd/topology.py`). With AFD, what the other role sends in one
step is an argument and what goes to it a result, so that each role stands for itself. Equal neighbouring layers are one
loop, which is what makes 61 layers compile in a minute. The bytes of arguments and of aliases are those of the real
parameter tree and cache; those of temporaries would mislead, since XLA:CPU widens FP8 and stacks the loop's weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, UInt8

from pallas_kernels.common import ENVIRONMENT_VARIABLE as KERNELS
from pallas_kernels.pages import KVPages
from pallas_kernels.storage import PAGE_SIZE, Storage
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.roles import Parts, Skeleton, Tokens, attention_step, begin_step, end_step, ffn_step, take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import count_pages, empty_cache
from step3_jax.checkpoint.names import is_fp8_tensor, parameters_of, released_name
from step3_jax.cli.plan_process import Compilation
from step3_jax.config import ModelConfig
from step3_jax.layers.attention import CacheStep, at_layer, attention_context
from step3_jax.layout.deployment import Deployment
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN
from step3_jax.layout.payload import choose_payload
from step3_jax.layout.role import check_deployment
from step3_jax.layout.tensor import scale_shape
from step3_jax.mesh import Layout, make_layout
from step3_jax.model.parallel import parallelise, place_shapes
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.model.text import AttentionBlock, FfnBlock
from step3_jax.planner.memory import CacheShape, CompiledBytes, rows_at_once
from step3_jax.quant import FP8, BlockScaled

# Only the bytes are wanted, not a fast program.
COMPILER_OPTIONS: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}

Kind = TypeVar("Kind")
Carry = TypeVar("Carry")
Layer = TypeVar("Layer")
Out = TypeVar("Out")

# What stands for a layer in each program: its form, and its arrays.
_Pair = tuple[Skeleton[AttentionBlock], Skeleton[FfnBlock]]
_BothLayer = tuple[list[Array], list[Array], Array]
_AttentionLayer = tuple[list[Array], Array, Array]


def compile_alone(config: ModelConfig, deployment: Deployment, cache: CacheShape) -> Compilation:
    """Compiles in this process, which has used no device yet; arguments as for `plan_process.compile_deployment`.

    Raises:
      ValueError: If the deployment does not divide the model; the message says what would.
    """
    # Before the first use of a device. A number of devices in XLA_FLAGS would contradict ours.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "force_host_platform_device_count" not in flag)
    # A program out of the cache need not tell its aliases.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", deployment.num_devices)
    os.environ[KERNELS] = "reference"
    compiled = compile_here(config, deployment, cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In kB, on macOS in bytes.
    return Compilation(compiled, 0.0, peak if sys.platform == "darwin" else peak * 1024)


def compile_here(config: ModelConfig, deployment: Deployment, cache: CacheShape) -> dict[str, CompiledBytes]:
    """The bytes by the name of the role; this process needs as many devices as the deployment has."""
    model = abstract_model(config)
    rows = rows_at_once(deployment)
    if deployment.topology is None:
        return {BOTH: _compile_both(model, make_layout(check_deployment(config, deployment)), deployment, cache)}
    topology = AfdTopology.of(deployment.topology, deployment.parallel)
    topology.check(config)
    form = PayloadFormat.of(config.text, choose_payload(deployment.payload, config.dtype))
    received = -(-rows * topology.num_attention // topology.num_ffn)
    return {
        ATTENTION: _compile_attention(model, topology, deployment, cache, form, rows),
        FFN: _compile_ffn(model, topology.ffn, form, received),
    }


def abstract_model(config: ModelConfig) -> Step3:
    """The module with shapes for arrays, linear weights of the decoder in FP8 if the configuration says so."""
    model = abstract_step3(config)
    if config.quantization is None:
        return model
    block = config.quantization.weight_block_size
    for path, variable in parameters_of(model).items():
        if is_fp8_tensor(released_name(path)):
            shape = variable.get_value().shape
            quantised = jax.eval_shape(
                lambda shape=shape: BlockScaled(jnp.zeros(shape, FP8), jnp.zeros(scale_shape(shape, block)), block)
            )
            variable.set_value(quantised)
    return model


def _compile_both(model: Step3, layout: Layout, deployment: Deployment, cache: CacheShape) -> CompiledBytes:
    """A decode step of the whole model on every device."""
    text = model.config.text
    placed = parallelise(place_shapes(model, layout), layout)
    parts = take_apart(placed)
    kinds = [(a.skeleton, f.skeleton) for a, f in zip(parts.attention, parts.ffn, strict=True)]

    def step(
        weights: _Weights,
        pool: KVPages,
        last: Int[Array, " B"],
        table: Int[Array, "B max_pages"],
        lengths: Int[Array, " B"],
    ) -> tuple[KVPages, Int[Array, " B"]]:
        ends = parts.ends.skeleton.build(weights.ends)
        hidden = ends.embed_tokens(last[:, None])
        context = attention_context(text, (last.shape[0], 1), step=CacheStep(table, lengths))

        layer_pages = count_pages(pool, len(kinds))

        def run_layer(
            kind: _Pair, carry: tuple[Array, KVPages], given: _BothLayer
        ) -> tuple[tuple[Array, KVPages], None]:
            (hidden, pool), (attention, ffn), (attention_leaves, ffn_leaves, layer) = carry, kind, given
            out = attention.build(attention_leaves)(hidden, at_layer(context, layer, layer_pages), pool)
            added = ffn.build(ffn_leaves)(out.normed, out.routing).reshape(hidden.shape)
            return (out.residual + added, cast(KVPages, out.pages)), None

        numbers = jnp.arange(len(kinds), dtype=jnp.int32)
        layers = list(zip(weights.attention, weights.ffn, numbers, strict=True))
        (hidden, pool), _ = run_layers(run_layer, kinds, (hidden, pool), layers)
        logits = ends.lm_head(ends.norm(hidden)[:, 0]).astype(jnp.float32)
        return pool, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    pool, inputs = _shape_cache(model, layout, deployment, cache), _step_inputs(layout, cache, cache.rows)
    return _measure(step, layout, _Weights.of(parts), pool, inputs, vision=_vision_leaves(placed))


def _compile_attention(
    model: Step3, topology: AfdTopology, deployment: Deployment, cache: CacheShape, form: PayloadFormat, rows: int
) -> CompiledBytes:
    """A decode step of one micro-batch on the attention side."""
    text, layout = model.config.text, topology.attention
    placed = place_shapes(model, topology)
    parts = take_apart(placed)
    kinds = [part.skeleton for part in parts.attention]

    def step(
        weights: _Weights,
        pool: KVPages,
        last: Int[Array, " B"],
        table: Int[Array, "B max_pages"],
        lengths: Int[Array, " B"],
        returned: list[UInt8[Array, "B output_bytes"]],
    ) -> tuple[KVPages, list[UInt8[Array, "B row_bytes"]], Int[Array, " B"]]:
        ends = parts.ends.skeleton.build(weights.ends)
        tokens = begin_step(ends, text, form, last[:, None], CacheStep(table, lengths), PAGE_SIZE)

        layer_pages = count_pages(pool, len(kinds))

        def run_layer(
            kind: Skeleton[AttentionBlock], carry: tuple[Tokens, KVPages], given: _AttentionLayer
        ) -> tuple[tuple[Tokens, KVPages], Array]:
            (tokens, pool), (leaves, back, layer) = carry, given
            residual, sent, pool = attention_step(kind.build(leaves), form, tokens, pool, layer, layer_pages)
            return (tokens._replace(hidden=residual, returned=back), pool), sent

        numbers = jnp.arange(len(kinds), dtype=jnp.int32)
        layers = list(zip(weights.attention, returned, numbers, strict=True))
        (tokens, pool), sent = run_layers(run_layer, kinds, (tokens, pool), layers)
        chosen = jnp.argmax(end_step(ends, form, tokens), axis=-1).astype(jnp.int32)
        return pool, sent, chosen

    weights = _Weights.of(dataclasses.replace(parts, ffn=[]))
    inputs = (
        *_step_inputs(layout, cache, rows),
        [_rows(layout, rows, form.output_bytes, dtype=jnp.uint8) for _ in parts.attention],
    )
    pool = _shape_cache(model, layout, deployment, cache)
    return _measure(step, layout, weights, pool, inputs, vision=_vision_leaves(placed))


def _compile_ffn(model: Step3, layout: Layout, form: PayloadFormat, rows: int) -> CompiledBytes:
    """The FFN side's part of a decode step of one micro-batch."""
    text, dtype = model.config.text, jnp.dtype(model.config.dtype)
    parts = take_apart(place_shapes(model, layout))
    kinds = [part.skeleton for part in parts.ffn]

    def step(
        weights: _Weights, pool: None, sent: list[UInt8[Array, "N row_bytes"]]
    ) -> list[UInt8[Array, "N output_bytes"]]:
        del pool  # There is none on this side.

        def run_layer(kind: Skeleton[FfnBlock], carry: None, given: tuple[list[Array], Array]) -> tuple[None, Array]:
            leaves, own = given
            return carry, ffn_step(kind.build(leaves), layout, text.moe_num_experts, form, own, dtype)

        return run_layers(run_layer, kinds, None, list(zip(weights.ffn, sent, strict=True)))[1]

    inputs = ([_rows(layout, rows, form.row_bytes, dtype=jnp.uint8) for _ in parts.ffn],)
    weights = _Weights([], [], [part.leaves for part in parts.ffn])
    return _measure(step, layout, weights, None, inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weights:
    """Arrays of a role: outside the layers, and of each layer's halves."""

    ends: list[Array]
    attention: list[list[Array]]
    ffn: list[list[Array]]

    @classmethod
    def of(cls, parts: Parts) -> _Weights:
        return cls(parts.ends.leaves, [part.leaves for part in parts.attention], [part.leaves for part in parts.ffn])


def _vision_leaves(model: Step3) -> list[Array]:
    """Arrays of vision tower and projector."""
    modules = [model.vision, model.projector] if model.vision is not None else []
    return [leaf for module in modules for leaf in jax.tree.leaves(nnx.state(module))]


def run_layers(
    run_layer: Callable[[Kind, Carry, Layer], tuple[Carry, Out]],
    kinds: Sequence[Kind],
    carry: Carry,
    layers: Sequence[Layer],
) -> tuple[Carry, list[Out]]:
    """Runs layers one after the other, equal neighbours as one loop.

    Args:
      run_layer: (kind, carry, the layer's arrays) -> (carry, the layer's results).
      kinds: Of each layer; those of equal neighbours are equal.
      carry: What goes from layer to layer.
      layers: Arrays of each layer, a pytree.

    Returns:
      The carry behind the last layer, and the results of each.
    """
    results: list[Out] = []
    for kind, group in itertools.groupby(kinds):
        count = len(list(group))
        own = layers[len(results) : len(results) + count]
        if count == 1:
            carry, out = run_layer(kind, carry, own[0])
            results.append(out)
            continue
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *own)
        carry, outs = jax.lax.scan(functools.partial(run_layer, kind), carry, stacked)
        results += [jax.tree.map(lambda array, layer=layer: array[layer], outs) for layer in range(count)]
    return carry, results


def _shape_cache(model: Step3, layout: Layout, deployment: Deployment, cache: CacheShape) -> KVPages:
    """The pool of all layers and devices, as it lies."""
    text, sharding = model.config.text, layout.sharding("rows")
    count = cache.num_pages * layout.size("rows")
    storage = cast(Storage, deployment.kv_cache)
    pool = jax.eval_shape(lambda: empty_cache(text, count, storage, as_bits=True))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), pool)


def _step_inputs(layout: Layout, cache: CacheShape, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Last tokens, page table and lengths."""
    return _rows(layout, rows), _rows(layout, rows, cache.pages_per_row), _rows(layout, rows)


def _rows(layout: Layout, rows: int, *rest: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with `rows` rows on each device."""
    return jax.ShapeDtypeStruct((rows * layout.size("rows"), *rest), dtype, sharding=layout.sharding("rows"))


def _measure(
    step: Callable[..., object],
    layout: Layout,
    weights: _Weights,
    pool: KVPages | None,
    inputs: tuple[object, ...],
    *,
    vision: Sequence[Array] = (),
) -> CompiledBytes:
    """Compiles a step, the same on each device's own part, and reads the bytes of one device.

    Args:
      step: Takes weights, pool and inputs.
      layout: The devices of the role.
      weights: Shapes of what the step multiplies with.
      pool: The cache; None on a side that has none.
      inputs: What else the step takes.
      vision: What the step has no use for and is on the devices all the same, perhaps along axes of another mesh.

    Raises:
      RuntimeError: If the program takes other arguments than it is given, which would make its bytes worthless.
    """
    arguments = (weights, pool, *inputs)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
    mapped = jax.shard_map(step, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec("rows"), check_vma=False)

    def call(vision: Sequence[Array], *arguments: object) -> object:
        del vision
        return mapped(*arguments)

    program = jax.jit(call, donate_argnums=2, keep_unused=True).lower(vision, *arguments).compile(COMPILER_OPTIONS)
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this version of jax does not tell the memory of a program for CPUs")
    kv_cache = memory.alias_size_in_bytes
    found = memory.argument_size_in_bytes - kv_cache - _device_bytes(inputs)
    given = _device_bytes((weights, vision)), _device_bytes(pool)
    if (found, kv_cache) != given:
        raise RuntimeError(
            f"the compiled program has {found:,} bytes of weights and {kv_cache:,} of cache on a device, and was given "
            f"{given[0]:,} and {given[1]:,}"
        )
    num_tokens = 0
    if pool is not None:
        num_tokens = count_pages(pool, len(weights.attention)) // layout.size("rows") * pool.page_size
    return CompiledBytes(found, kv_cache, num_tokens)


def _device_bytes(tree: object) -> int:
    """Bytes of the arrays of a tree on one device."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        sharding = leaf.sharding
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        return int(functools.reduce(lambda a, b: a * b, shape, 1)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
