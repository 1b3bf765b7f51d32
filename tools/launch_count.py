"""Counts what a decode step launches in each layer, from XLA's own list for an H100: no GPU is needed.

python -m tools.launch_count [--layers N]

The model is as the engine loads it on a GPU: stacked layers, joined products, quantised activations. One device has
all of it, with six experts per layer, as one of eight ranks has. XLA lists what a program launches, in order, with nested
loops; what the loop over layers contains is what a layer costs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
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
SEQUENCE, METADATA = "*.thunk_sequence_after_thunk_passes.txt", "*.thunk_metadata.txt"
# What contains launches and is not one itself.
GROUPS = ("kCommandBuffer", "kSequential", "kConditional", "kWhile")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
      instruction: Its name in the compiled program.
      kind: What XLA calls it.
      path: The functions that it comes from.
      is_ours: Whether it is a kernel of `pallas_kernels`.
    """

    instruction: str
    kind: str
    path: str
    is_ours: bool

    @property
    def part(self) -> str:
        """The part of a layer; "-" for what lies between them: norms, sums, the counter."""
        found = re.search(r"/(self_attn|router|moe|share_expert|mlp)/", self.path)
        return found[1] if found else "-"

    @property
    def name(self) -> str:
        """The name of one of our kernels; the operation for one of XLA's."""
        steps = self.path.split("/")
        return steps[-2] if self.is_ours and len(steps) > 1 else self.instruction


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over layers.

    Attributes:
      layers: Which layers, such as "layers.2-3".
      launches: Those of one iteration, in order.
    """

    layers: str
    launches: tuple[Launch, ...]


def compile_step(num_layers: int, folder: pathlib.Path, *, batch: int = BATCH) -> jax.stages.Compiled:
    """The decode loop of a model with two dense layers and the rest with experts; XLA's lists are written to `folder`."""
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


def read_loops(folder: pathlib.Path, program: str) -> list[Loop]:
    """The loops over layers that XLA has listed in `folder`, in order.

    Args:
      folder: The folder that `compile_step` was given.
      program: The compiled program as text, which has the names of the functions that instructions come from.
    """
    lines = next(folder.glob(SEQUENCE)).read_text(encoding="utf-8").splitlines()
    names = _read_names(next(folder.glob(METADATA)).read_text(encoding="utf-8"))
    loops: list[Loop] = []
    for start, line in enumerate(lines):
        if " kWhile " not in line:
            continue
        depth = len(line) - len(line.lstrip())
        body = list(itertools.takewhile(functools.partial(_is_inside, depth), lines[start + 1 :]))
        body = body[next(index for index, inner in enumerate(body) if inner.strip() == "body:") + 1 :]
        if any(" kWhile " in inner for inner in body):
            continue
        found = [(int(match[1]), match[2]) for inner in body if (match := re.match(r" *(\d+): (k\w+)", inner))]
        launches = [_describe(names.get(number, kind), kind, program) for number, kind in found if kind not in GROUPS]
        layers = re.search(r"layers\.[\d-]+", " ".join(launch.path for launch in launches))
        if layers is not None:
            loops.append(Loop(layers[0], tuple(launches)))
    return loops


def table(loop: Loop) -> list[str]:
    """Lines of a Markdown table: launches by the part of the layer that they come from, ours and XLA's separately."""
    parts: dict[str, list[Launch]] = {}
    for launch in loop.launches:
        parts.setdefault(launch.part, []).append(launch)
    lines = ["| part of the layer | our kernels | XLA's |", "| --- | --- | --- |"]
    for part, launches in parts.items():
        ours, theirs = ([launch.name for launch in launches if launch.is_ours is wanted] for wanted in (True, False))
        lines.append(f"| {part} | {_list(ours)} | {_list(theirs)} |")
    num_ours = sum(launch.is_ours for launch in loop.launches)
    lines.append(f"| total: {len(loop.launches)} | {num_ours} | {len(loop.launches) - num_ours} |")
    return lines


def section(num_layers: int = 4) -> str:
    """What a layer launches, as a section of a page in Markdown."""
    lines = [
        "",
        "## What a layer launches in a decode step",
        "",
        f"{BATCH} sequences, FP8 weights and cache, {NUM_EXPERTS} experts on the device, as XLA lists it for an H100",
        "(`python -m tools.launch_count`), including the loop's counter. Layers 0 and 1 are dense.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = compile_step(num_layers, pathlib.Path(folder)).as_text() or ""
        for loop in read_loops(pathlib.Path(folder), program):
            lines += ["", f"`{loop.layers}`:", "", *table(loop)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the model, two of them dense (default 4)")
    print(section(parser.parse_args().layers))


def _is_inside(depth: int, line: str) -> bool:
    """Whether a line belongs to what starts at `depth`; XLA does not indent these two words."""
    return line.strip() in ("condition:", "body:") or len(line) - len(line.lstrip()) > depth


def _read_names(metadata: str) -> dict[int, str]:
    """The instruction of each launch."""
    found = re.finditer(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata)
    return {int(match[2]): match[1] for match in found}


def _describe(instruction: str, kind: str, program: str) -> Launch:
    line = re.search(rf"^ *(?:ROOT )?%{re.escape(instruction)} = .*?$", program, re.MULTILINE)
    path = re.search(r'op_name="([^"]*)"', line[0]) if line else None
    is_ours = line is not None and 'custom_call_target="mosaic_gpu_v2"' in line[0]
    return Launch(instruction, kind, path[1] if path else "", is_ours)


def _list(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "-"


if __name__ == "__main__":
    main()
