"""Counts what a decode step launches in each layer, in XLA's own list of it for an H100: no GPU is needed.

python -m tools.launch_count [--layers N]

The model is the product's, as it is loaded on a GPU: stacked layers, joined products, quantised activations. One device has
all of it but six experts a layer, as a rank of eight has. XLA writes down what a program launches, in order, loops nested;
what stands in the loop over layers is what a layer costs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp

from step3_jax.cache.paged import empty_cache
from step3_jax.checkpoint.shapes import abstract_model
from step3_jax.config import ModelConfig, QuantConfig, TextConfig
from step3_jax.engine.runner import SplitModel, TracedCalls
from step3_jax.engine.state import DecodeBatch
from step3_jax.gpu import COMPILER_OPTIONS
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from tools import gpu_compile

NUM_EXPERTS = 6
BATCH, CONTEXT, MAX_STEPS = 128, 4096, 8
DUMPED = "*thunk_sequence_after_thunk_passes.txt"


def compile_step(num_layers: int, folder: pathlib.Path, *, batch: int = BATCH) -> jax.stages.Compiled:
    """The decode loop of a model with two dense layers and the rest with experts; XLA's lists go to `folder`."""
    text = TextConfig(num_hidden_layers=num_layers, moe_layers=tuple(range(2, num_layers)), moe_num_experts=NUM_EXPERTS)
    config = ModelConfig(
        text=text, vision=None, dtype="bfloat16", image_token_id=0, eos_token_id=0, quantization=QuantConfig()
    )
    model = arrange(abstract_model(config), Arrangement.of("gpu", config.dtype))
    split = SplitModel(model)
    calls = TracedCalls(split.build, collections.Counter(), text)
    width = -(-(CONTEXT + MAX_STEPS) // 64)

    def numbers(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = jax.eval_shape(lambda: empty_cache(text, batch * width, "fp8"))
    row = SamplingRow(SamplingParams(temperature=0), 2 * MAX_STEPS, (0, 0), ())
    sampling = jax.eval_shape(lambda: sampling_batch([row] * batch, text.vocab_size, batch))
    steps = DecodeBatch(
        numbers(batch), numbers(batch), numbers(batch), numbers(batch, dtype=bool), numbers(batch, width)
    )
    return gpu_compile.compile_for(
        gpu_compile.h100_mesh(),
        lambda *given: calls.decode(*given, max_steps=MAX_STEPS),
        split.weights,
        cache,
        steps,
        sampling,
        numbers(),
        numbers(dtype=bool),
        donate=(1,),
        compiler_options={**COMPILER_OPTIONS, "xla_dump_to": str(folder)},
    )


if __name__ == "__main__":
    import sys, time

    t = time.time()
    out = pathlib.Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    c = compile_step(int(sys.argv[2]), out)
    print(time.time() - t, c.memory_analysis().temp_size_in_bytes / 1e6, c.as_text().count("mosaic_gpu_v2"))
    open(out / "hlo.txt", "w").write(c.as_text())
