"""Times the compilation of the decode loop for H100s that exist only as a description, layers stacked and apart.

    python -m tools.compile_time --devices 1 --layers 61 [--apart] [--out benchmarks/compile-time]

One device has six experts per layer, as one of eight ranks has; eight devices have all 48, by `--tp 8`. Each run is a
separate process and adds a row to OUT.json and OUT.md. Needs Python 3.12 and the extra `aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp

from step3_jax.cache.paged import empty_cache
from step3_jax.checkpoint.shapes import abstract_model
from step3_jax.config import ModelConfig
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.state import DecodeBatch
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import make_layout
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.parallel import place_shapes
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from tools import gpu_compile
from tools.record_kernels import write

# A batch of 128 sequences of 4,096 tokens on each device, with FP8 pages, and room for one more.
ROWS, WIDTH, MAX_STEPS = 128, 65, 8
EXPERTS_EACH = 6
KERNEL = 'custom_call_target="mosaic_gpu_v2"'


def measure(num_devices: int, num_layers: int, *, stacks: bool) -> dict[str, object]:
    """Seconds taken to lower and to compile a decode loop, and the size of the program."""
    config = ModelConfig.preset("step3-fp8")
    text = dataclasses.replace(config.text, moe_num_experts=EXPERTS_EACH * num_devices)
    if num_layers < text.num_hidden_layers:
        moe_layers = tuple(range(1, num_layers))
        text = dataclasses.replace(text, num_hidden_layers=num_layers, moe_layers=moe_layers)
    config = dataclasses.replace(config, text=text, vision=None, dtype="bfloat16")
    parallel = fit_parallel(Parallel(tp=num_devices), text, fp8_block=(128, 128))
    devices = gpu_compile.h100_mesh((num_devices,)).devices.reshape(-1).tolist()
    layout = make_layout(parallel, devices)
    arrangement = dataclasses.replace(Arrangement.of("gpu", config.dtype), stacks=stacks)
    model = arrange(place_shapes(abstract_model(config), layout), arrangement)
    pages = jax.eval_shape(lambda: empty_cache(text, ROWS * WIDTH * num_devices, "fp8"))
    rows = layout.sharding("rows")
    cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), pages)
    count = ROWS * num_devices

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), jnp.int32)

    active = jax.ShapeDtypeStruct((count,), jnp.bool_)
    batch = DecodeBatch(numbers(), numbers(), numbers(), active, numbers(WIDTH))
    row = SamplingRow(SamplingParams(temperature=0), 1, (0, 0), ())
    sampling = jax.eval_shape(lambda: sampling_batch([row], text.vocab_size, count))
    cpu_s, start = time.process_time(), time.perf_counter()
    lowered = ShardedRunner(model, layout).lower_decode(cache, batch, sampling, max_steps=MAX_STEPS)
    lowered_at = time.perf_counter()
    program = lowered.compile()
    compile_s = time.perf_counter() - lowered_at
    memory = program.memory_analysis()
    return {
        "devices": num_devices,
        "layers": num_layers,
        "form": "stacked" if stacks else "apart",
        "lower_s": round(lowered_at - start, 1),
        "compile_s": round(compile_s, 1),
        "cpu_s": round(time.process_time() - cpu_s, 1),
        "load": round(os.getloadavg()[0], 1),
        "kernels": (program.as_text() or "").count(KERNEL),
        "temp_mb": round(memory.temp_size_in_bytes / 1e6),
        "argument_gb": round(memory.argument_size_in_bytes / 1e9, 1),
        "jax": jax.__version__,
    }


def table(found: list[dict[str, object]]) -> str:
    """All rows as a page."""
    names = list(found[0])
    lines = [
        "# Compiling the decode loop for H100s",
        "",
        "Without a GPU: `python -m tools.compile_time` adds a row. Real widths, 128 sequences of 4,096 tokens on each",
        f"device, FP8 weights and pages, {EXPERTS_EACH} experts on each device. `cpu_s` is the processor time of the",
        "process (Python and XLA, on two cores). Where `load` is far above two, other programs were running, and the",
        "wall times of lowering and compiling say little. The programs were not run.",
        "",
        "| " + " | ".join(names) + " |",
        "| " + " | ".join("---" for _ in names) + " |",
        *("| " + " | ".join(str(one[name]) for name in names) + " |" for one in found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Adds a row to OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(prog="python -m tools.compile_time", description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--apart", action="store_true", help="layers as separate modules, not in stacks")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/compile-time"))
    args = parser.parse_args()
    if gpu_compile.missing():
        parser.error(str(gpu_compile.missing()))
    path = args.out.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else []
    found.append(measure(args.devices, args.layers, stacks=not args.apart))
    write(path, json.dumps(found, indent=1) + "\n")
    write(args.out.with_suffix(".md"), table(found))


if __name__ == "__main__":
    main()
