"""Compiles the sharded step of the real model for H100s that exist only as a description; prints what came out as JSON.

    python compile_step.py DEVICES LAYERS

With fewer layers than the model's, the first is dense and the others have experts. With all of them nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

# First: it tells jax to use the CPU alone.
from tools import gpu_compile  # isort: skip

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from step3_jax.cache.paged import Cache, empty_cache
from step3_jax.checkpoint import shapes
from step3_jax.config import ModelConfig, VisionConfig
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.state import DecodeBatch, PrefillBatch
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import Layout, make_layout
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.parallel import place_shapes
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

CONFIG = ModelConfig.preset("step3-fp8")
# Layers of the vision tower, and pixels of a view's side.
TOWER_LAYERS, VIEW = 2, 728
# A batch of 64 sequences of up to 4K per device, with fp8 pages.
ROWS, WIDTH, PAGES = 64, 64, 64 * 64
CHUNK = 512
SETTINGS = {
    8: Parallel(tp=8),
    32: Parallel(dp=4, tp=8, exchange="all_to_all"),
}


def abstract_model(num_layers: int, layout: Layout) -> Step3:
    text, vision = CONFIG.text, None
    if num_layers < text.num_hidden_layers:
        text = dataclasses.replace(text, num_hidden_layers=num_layers, moe_layers=tuple(range(1, num_layers)))
        vision = dataclasses.replace(VisionConfig(), num_hidden_layers=TOWER_LAYERS)
    config = dataclasses.replace(CONFIG, text=text, vision=vision)
    config = dataclasses.replace(config, dtype="bfloat16")
    return arrange(place_shapes(shapes.abstract_model(config), layout), Arrangement.of("gpu", config.dtype))


def cache_shapes(model: Step3, layout: Layout) -> Cache:
    num_pages, rows = PAGES * layout.size("rows"), layout.sharding("rows")
    cache = jax.eval_shape(lambda: empty_cache(model.config.text, num_pages, "fp8"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), cache)


def sampling_shapes(batch_size: int) -> SamplingBatch:
    row = SamplingRow(SamplingParams(temperature=0.0), 1, (0, 0), ())
    shapes = jax.eval_shape(lambda: sampling_batch([row], CONFIG.text.vocab_size, batch_size))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def bytes_each(tree: object) -> int:
    """Bytes of one device's part."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf.sharding, NamedSharding)
    )


def describe(program: jax.stages.Compiled) -> dict[str, object]:
    memory, text = program.memory_analysis(), program.as_text() or ""
    words = ("all-reduce(", "all-reduce-start(", "reduce-scatter(", "all-to-all(", 'custom_call_target="mosaic_gpu_v2"')
    # Those of the sampler are under "sample".
    choices = [line for line in text.splitlines() if " conditional(" in line and "/sample/" not in line]
    return {
        "argument": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "count": {word: text.count(word) for word in words} | {"conditional(": len(choices)},
    }


def main() -> None:
    num_devices, num_layers = map(int, sys.argv[1:])
    parallel = fit_parallel(SETTINGS[num_devices], CONFIG.text, fp8_block=(128, 128))
    layout = make_layout(parallel, gpu_compile.h100_mesh((num_devices,)).devices.reshape(-1).tolist())
    model = abstract_model(num_layers, layout)
    cache = cache_shapes(model, layout)
    found: dict[str, object] = {"weights": bytes_each(nnx.state(model.text)), "pages": bytes_each(cache)}
    if num_layers < CONFIG.text.num_hidden_layers:
        runner, count = ShardedRunner(model, layout), ROWS * num_devices

        def numbers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        active = jax.ShapeDtypeStruct((count,), jnp.bool_)
        batch = DecodeBatch(numbers(count), numbers(count), numbers(count), active, numbers(count, WIDTH))
        sampling = sampling_shapes(count)
        found["decode"] = describe(runner.decode_program(cache, batch, sampling, max_steps=32))
        chunk = PrefillBatch(
            numbers(CHUNK * num_devices), numbers((ROWS + 1) * num_devices), numbers(count), numbers(count, WIDTH)
        )
        found["prefill"] = describe(runner.prefill_program(cache, chunk))
        pixels = jax.ShapeDtypeStruct((layout.size("images"), 3, VIEW, VIEW), jnp.float32)
        found["encode"] = describe(runner.encode_program(pixels))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
