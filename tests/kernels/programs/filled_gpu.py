"""Prints how often XLA recomputes something in the decode loop of a GPU that weights and cache fill to 0.9.

Compiled from shapes for an H100: `python filled_gpu.py yes` with the options of every program for GPUs, `no` without.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from step3_jax.cache.paged import empty_cache
from step3_jax.engine import executor, sharded
from step3_jax.engine.state import DecodeBatch
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import make_layout
from tests.mesh.programs.compile_step import CONFIG, abstract_model, bytes_each, sampling_shapes
from tools import gpu_compile

FILLED = 0.9
H100_BYTES = 84_942_979_072
LAYERS, ROWS, WIDTH = 3, 64, 64


def main() -> None:
    if sys.argv[1] == "no":
        executor.compiler_options = lambda platform: None
    parallel = fit_parallel(Parallel(), CONFIG.text, fp8_block=(128, 128))
    layout = make_layout(parallel, gpu_compile.h100_mesh().devices.reshape(-1).tolist())
    model = abstract_model(LAYERS, layout)
    # A decode step is not given the vision tower.
    weights = bytes_each(nnx.state(model.text))

    def cache_of(num_pages: int) -> object:
        shapes = jax.eval_shape(lambda: empty_cache(model.config.text, num_pages, "fp8"))
        rows = layout.sharding("rows")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), shapes)

    num_pages = int((FILLED * H100_BYTES - weights) // bytes_each(cache_of(1)))
    cache = cache_of(num_pages)

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    active = jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
    batch = DecodeBatch(numbers(ROWS), numbers(ROWS), numbers(ROWS), active, numbers(ROWS, WIDTH))
    runner = sharded.ShardedRunner(model, layout)
    program = runner.decode_program(cache, batch, sampling_shapes(ROWS), max_steps=32)
    memory = program.memory_analysis()
    found = {
        "share": memory.argument_size_in_bytes / H100_BYTES,
        "temp": memory.temp_size_in_bytes,
        "remat": (program.as_text() or "").count("remat"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
