"""The decode programs of a deployment, compiled only from shapes: no weights, no accelerator.

A deployment whose devices do everything uses the decode loop of the engine's own executor. With AFD, each role's whole
decode step of one micro-batch is compiled for as many devices as it has; what the other role sends is an argument and
what goes to it is a result, so that each role is independent. A role whose devices are CPUs is left out: its layers call
kernels that need a C compiler. Weights and cache are arranged as in the running system: on GPUs, layers of the same
structure are stacked. The bytes of arguments and aliases are those of the real parameter tree and cache; those of
temporaries would mislead, as the programs are compiled for CPU devices, where layers are copied out of their stacks and
FP8 is widened.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, UInt8

from pallas_kernels.common import ENVIRONMENT_VARIABLE as KERNELS
from pallas_kernels.pages import KVPages
from pallas_kernels.storage import PAGE_SIZE, Storage
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.roles import Part, Tokens, attention_step, begin_step, end_step, ffn_step, take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import count_pages, empty_cache
from step3_jax.checkpoint.shapes import abstract_model
from step3_jax.cli.plan_process import Compilation
from step3_jax.config import ModelConfig
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.state import DecodeBatch
from step3_jax.layers.attention import CacheStep
from step3_jax.layout.deployment import Deployment
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN
from step3_jax.layout.payload import choose_payload
from step3_jax.layout.role import check_deployment, is_on_cpu
from step3_jax.mesh import Layout, make_layout
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.parallel import Places, place_shapes
from step3_jax.model.step3 import Step3
from step3_jax.model.text import AttentionBlock, FfnBlock
from step3_jax.planner.memory import CacheShape, CompiledBytes, rows_at_once
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.ngram import find_drafts
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.speculation import Speculation

# Only the bytes matter, not a fast program.
COMPILER_OPTIONS: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


def compile_alone(
    config: ModelConfig, deployment: Deployment, cache: CacheShape, speculation: Speculation | None = None
) -> Compilation:
    """Compiles in this process, which has used no device yet; arguments as for `plan_process.compile_deployment`.

    Raises:
      ValueError: If the deployment does not divide the model; the message says which would.
    """
    # Before the first use of a device. A number of devices in XLA_FLAGS would contradict ours.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "force_host_platform_device_count" not in flag)
    # A program from the cache may not report its aliases.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", deployment.num_devices)
    os.environ[KERNELS] = "reference"
    compiled = compile_here(config, deployment, cache, speculation)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In kB, on macOS in bytes.
    return Compilation(compiled, 0.0, peak if sys.platform == "darwin" else peak * 1024)


def compile_here(
    config: ModelConfig, deployment: Deployment, cache: CacheShape, speculation: Speculation | None = None
) -> dict[str, CompiledBytes]:
    """The bytes by the name of each compiled role; this process needs as many devices as the deployment has."""
    if deployment.topology is None:
        layout = make_layout(check_deployment(config, deployment))
        return {BOTH: _compile_both(_place(config, layout), layout, deployment, cache, speculation)}
    topology = AfdTopology.of(deployment.topology, deployment.parallel)
    topology.check(config)
    form = PayloadFormat.of(config.text, choose_payload(deployment.payload, config.dtype))
    model = _place(config, topology)
    rows = rows_at_once(deployment)
    received = -(-rows * _step_tokens(speculation) * topology.num_attention // topology.num_ffn)
    found: dict[str, CompiledBytes] = {}
    if not is_on_cpu(deployment, ATTENTION):
        found[ATTENTION] = _compile_attention(model, topology, deployment, cache, form, rows, speculation)
    if not is_on_cpu(deployment, FFN):
        found[FFN] = _compile_ffn(model, topology.ffn, form, received)
    return found


def _place(config: ModelConfig, places: Places) -> Step3:
    """Shapes of the model as GPUs hold it, with these shardings."""
    return arrange(place_shapes(abstract_model(config), places), Arrangement.of("gpu", config.dtype))


def _compile_both(
    model: Step3, layout: Layout, deployment: Deployment, cache: CacheShape, speculation: Speculation | None
) -> CompiledBytes:
    """The decode loop of the whole model on every device."""
    runner = ShardedRunner(model, layout)
    num_rows = cache.rows * layout.size("rows")

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *shape), jnp.int32)

    is_active = jax.ShapeDtypeStruct((num_rows,), jnp.bool_)
    batch = DecodeBatch(numbers(), numbers(), numbers(), is_active, numbers(cache.pages_per_row))  # type: ignore[arg-type]
    if speculation is not None:
        batch = batch._replace(history=numbers(cache.pages_per_row * PAGE_SIZE), max_new=numbers())  # type: ignore[arg-type]
    row = SamplingRow(SamplingParams(temperature=0.0), 1, (0, 0), ())
    sampling = sampling_batch([row], model.config.text.vocab_size, num_rows)
    pool = _shape_cache(model, layout, deployment, cache)
    max_steps = _step_tokens(speculation)
    lowered = runner.lower_decode(pool, batch, sampling, max_steps=max_steps, speculation=speculation)
    program = lowered.compile(COMPILER_OPTIONS)
    vision = _vision_leaves(model)
    weights = jax.tree.leaves(nnx.state(model.text))
    num_tokens = _count_tokens(pool, layout, model.config.text.num_hidden_layers)
    # The tower has no part in a decode step and is on the devices all the same.
    inputs = batch, sampling, np.int32(1), np.bool_(False)
    return _read_bytes(program, weights, vision, pool, inputs, num_tokens, batch.history)


def _compile_attention(
    model: Step3,
    topology: AfdTopology,
    deployment: Deployment,
    cache: CacheShape,
    form: PayloadFormat,
    rows: int,
    speculation: Speculation | None,
) -> CompiledBytes:
    """A decode step of one micro-batch on the attention side."""
    text, layout = model.config.text, topology.attention
    parts = take_apart(model)

    def step(
        weights: _Weights,
        pool: KVPages,
        last: Int[Array, " B"],
        table: Int[Array, "B max_pages"],
        lengths: Int[Array, " B"],
        history: Int[Array, "sequences M"] | None,
        returned: list[UInt8[Array, "N output_bytes"]],
    ) -> tuple[KVPages, list[UInt8[Array, "layers N row_bytes"]], Int[Array, "B T"]]:
        ends = parts.ends.skeleton.build(weights.ends)
        ids, place = last[:, None], CacheStep(table, lengths)
        if speculation is not None and history is not None:
            drafts, is_found = find_drafts(history[: last.shape[0]], lengths, speculation)
            num_new = jnp.where(is_found, speculation.width, 1)
            ids, place = jnp.concatenate([ids, drafts], axis=1), CacheStep(table, lengths + num_new, num_new=num_new)
        tokens = begin_step(ends, text, form, ids, place, PAGE_SIZE)
        layer_pages = count_pages(pool, text.num_hidden_layers)
        first, sent = 0, []
        for part, leaves in zip(parts.attention, weights.layers, strict=True):
            own = jnp.stack(returned[first : first + part.num_layers])

            def run_layer(
                carry: tuple[Tokens, KVPages],
                given: tuple[Int[Array, ""], Array],
                part: Part[AttentionBlock] = part,
                leaves: list[Array] = leaves,
                first: int = first,
            ) -> tuple[tuple[Tokens, KVPages], Array]:
                (tokens, pool), (index, back) = carry, given
                block = part.build(leaves, index)
                residual, rows, pool = attention_step(block, form, tokens, pool, first + index, layer_pages)
                return (tokens._replace(hidden=residual, returned=back), pool), rows

            (tokens, pool), rows = jax.lax.scan(run_layer, (tokens, pool), (jnp.arange(part.num_layers), own))
            sent.append(rows)
            first += part.num_layers
        return pool, sent, jnp.argmax(end_step(ends, form, tokens), axis=-1).astype(jnp.int32)

    step_rows = rows * _step_tokens(speculation)
    shapes = [_rows(layout, step_rows, form.output_bytes, dtype=jnp.uint8)] * text.num_hidden_layers
    history = None if speculation is None else _shape_history(layout, cache)
    inputs = (*_step_inputs(layout, cache, rows), history, shapes)
    weights = _Weights(parts.ends.leaves, [part.leaves for part in parts.attention])
    pool = _shape_cache(model, layout, deployment, cache)
    outputs = layout.spec("rows"), layout.spec(None, "rows"), layout.spec("rows")
    program = _compile(step, layout, (weights, pool, *inputs), outputs)
    num_tokens = _count_tokens(pool, layout, text.num_hidden_layers)
    return _read_bytes(program, jax.tree.leaves(weights), _vision_leaves(model), pool, inputs, num_tokens, history)


def _compile_ffn(model: Step3, layout: Layout, form: PayloadFormat, rows: int) -> CompiledBytes:
    """The FFN side's part of a decode step of one micro-batch."""
    text, dtype = model.config.text, jnp.dtype(model.config.dtype)
    parts = take_apart(model)

    def step(
        weights: _Weights, pool: None, sent: list[UInt8[Array, "N row_bytes"]]
    ) -> list[UInt8[Array, "layers N output_bytes"]]:
        del pool  # There is none on this side.
        first, out = 0, []
        for part, leaves in zip(parts.ffn, weights.layers, strict=True):
            own = jnp.stack(sent[first : first + part.num_layers])

            def run_layer(
                given: tuple[Int[Array, ""], Array],
                part: Part[FfnBlock] = part,
                leaves: list[Array] = leaves,
            ) -> Array:
                index, rows = given
                return ffn_step(part.build(leaves, index), layout, text.moe_num_experts, form, rows, dtype)

            out.append(jax.lax.map(run_layer, (jnp.arange(part.num_layers), own)))
            first += part.num_layers
        return out

    inputs = ([_rows(layout, rows, form.row_bytes, dtype=jnp.uint8)] * text.num_hidden_layers,)
    weights = _Weights([], [part.leaves for part in parts.ffn])
    program = _compile(step, layout, (weights, None, *inputs), layout.spec(None, "rows"))
    return _read_bytes(program, jax.tree.leaves(weights), [], None, inputs, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weights:
    """Arrays of a role: those outside the layers, and those of its halves of the layers, stack by stack."""

    ends: list[Array]
    layers: list[list[Array]]


def _compile(
    step: Callable[..., object], layout: Layout, arguments: tuple[object, ...], outputs: object
) -> jax.stages.Compiled:
    """A step as a function of weights, pool and inputs, run on each device's own part."""
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
    mapped = jax.shard_map(step, mesh=layout.mesh, in_specs=specs, out_specs=outputs, check_vma=False)
    return jax.jit(mapped, donate_argnums=1).lower(*arguments).compile(COMPILER_OPTIONS)


def _vision_leaves(model: Step3) -> list[Array]:
    """Arrays of vision tower and projector."""
    modules = [model.vision, model.projector] if model.vision is not None else []
    return [leaf for module in modules for leaf in jax.tree.leaves(nnx.state(module))]


def _shape_cache(model: Step3, layout: Layout, deployment: Deployment, cache: CacheShape) -> KVPages:
    """The pool of all layers and devices, in its real layout."""
    text, sharding = model.config.text, layout.sharding("rows")
    count = cache.num_pages * layout.size("rows")
    storage = cast(Storage, deployment.kv_cache)
    pool = jax.eval_shape(lambda: empty_cache(text, count, storage, as_bits=True))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), pool)


def _count_tokens(pool: KVPages, layout: Layout, num_layers: int) -> int:
    """Tokens that a device's part of the pool holds."""
    return count_pages(pool, num_layers) // layout.size("rows") * pool.page_size


def _step_inputs(layout: Layout, cache: CacheShape, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Last tokens, page table and lengths."""
    return _rows(layout, rows), _rows(layout, rows, cache.pages_per_row), _rows(layout, rows)


def _step_tokens(speculation: Speculation | None) -> int:
    """Tokens of a sequence in a decode step."""
    return 1 if speculation is None else speculation.width


def _shape_history(layout: Layout, cache: CacheShape) -> jax.ShapeDtypeStruct:
    """The tokens of all devices' sequences, which each device has."""
    shape = cache.rows * layout.size("rows"), cache.pages_per_row * PAGE_SIZE
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.sharding())


def _rows(layout: Layout, rows: int, *rest: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with `rows` rows on each device."""
    return jax.ShapeDtypeStruct((rows * layout.size("rows"), *rest), dtype, sharding=layout.sharding("rows"))


def _read_bytes(
    program: jax.stages.Compiled,
    weights: Sequence[Array],
    others: Sequence[Array],
    pool: KVPages | None,
    inputs: object,
    num_tokens: int,
    history: object = None,
) -> CompiledBytes:
    """The bytes of one device, according to a compiled program.

    Args:
      program: A function of weights, pool and inputs.
      weights: Shapes of the weights that it uses.
      others: Shapes of other weights on the devices.
      pool: The cache; None on a side that has none.
      inputs: What else it takes; what it has no use for it may have left out.
      num_tokens: That the pool has room for.
      history: Of the inputs, the tokens in which guesses are looked up; None without.

    Raises:
      RuntimeError: If the program's arguments are not the ones given, which would make its bytes worthless.
    """
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this version of jax does not report the memory of a program for CPUs")
    kv_cache = memory.alias_size_in_bytes
    found = memory.argument_size_in_bytes - kv_cache
    given, given_cache, most = _device_bytes(weights), _device_bytes(pool), _device_bytes(inputs)
    least = given + _device_bytes(history)
    if kv_cache != given_cache or not least <= found <= given + most:
        raise RuntimeError(
            f"the compiled program has {found:,} bytes of weights and inputs and {kv_cache:,} of cache on a device, but was "
            f"given {given:,} of weights, {most:,} of inputs and {given_cache:,} of cache"
        )
    return CompiledBytes(given + _device_bytes(others), kv_cache, num_tokens, _device_bytes(history))


def _device_bytes(tree: object) -> int:
    """Bytes of the arrays of a tree on one device; an array without a sharding counts in full."""

    def size(leaf: jax.ShapeDtypeStruct | np.ndarray) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        return int(functools.reduce(lambda a, b: a * b, shape, 1)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
