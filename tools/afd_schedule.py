"""AFD's decode loops compiled for H100s on a machine that has none, and what overlaps with each exchange.

    python -m tools.afd_schedule --out benchmarks/afd-compiled

Executor `program` overlaps an exchange with a tick's work only if the compiler starts the exchange before that work and
waits for it afterwards. A compiled program lists its launches in the order in which they happen; this tool finds
the loops over ticks in it, and counts how much of a tick lies between start and end of its exchange.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Iterable

# First: it tells jax to use the CPU alone.
from tools import gpu_compile  # isort: skip

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.attention_loop import AttentionLoop, AttentionWeights
from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.exchange_hint import exchange_options
from step3_jax.afd.program.ffn_loop import FfnLoop
from step3_jax.afd.program.process import COPY, OWN
from step3_jax.afd.roles import Part, take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import empty_cache
from step3_jax.checkpoint.shapes import abstract_model
from step3_jax.config import ModelConfig
from step3_jax.engine.state import DecodeBatch
from step3_jax.layout.deployment import parse_topology
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.parallel import place_shapes
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from tools.record_kernels import write

# Of each FFN device: a rank's share of Step3's 48.
EXPERTS_EACH = 6
# Of an attention device: sequences in all its micro-batches, and tokens of each in the cache, which just fit its memory.
SEQUENCES, CONTEXT, MAX_STEPS = 384, 4096, 32
CASES = (("1a1f", 3), ("1a1f", 4), ("2a2f", 3), ("2a2f", 4))

_START = re.compile(r"(collective-permute|all-to-all)-start\(")
_DONE = re.compile(r"(collective-permute|all-to-all)-done\(")
# An exchange that is waited for at once.
_AT_ONCE = re.compile(r" (collective-permute|all-to-all)\(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
# Instructions that do not become a launch.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_MOSAIC = "mosaic_gpu"


@dataclasses.dataclass(frozen=True)
class Tick:
    """A loop's body with one exchange: a tick.

    Attributes:
      scope: The layers, as a profile names them.
      kernels: Our kernels.
      kernels_beside: Those between start and end of the exchange.
      launches: Everything that is launched, the exchange not counted.
      launches_beside: Those between.
    """

    scope: str
    kernels: int
    kernels_beside: int
    launches: int
    launches_beside: int


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
      spec: xAyF, one device an instance.
      num_microbatches: In flight.
      role: "attention" or "ffn".
      num_layers: Of the model; the first and the last are dense if there are fewer than 61.
    """

    spec: str
    num_microbatches: int
    role: str
    num_layers: int = 61

    @property
    def num_rows(self) -> int:
        """Of all micro-batches of an attention device."""
        return SEQUENCES // self.num_microbatches * self.num_microbatches


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
      case: What was compiled.
      lower_s, compile_s: Seconds of processor time.
      temp_bytes: Of temporaries on a device.
      ticks: The loops over ticks.
    """

    case: Case
    lower_s: float
    compile_s: float
    temp_bytes: int
    ticks: list[Tick]


def make_config(case: Case) -> ModelConfig:
    """Step3 in FP8 with so many layers, and with the share of its experts that the FFN devices hold."""
    config = ModelConfig.preset("step3-fp8")
    instances = parse_topology(case.spec)
    text = dataclasses.replace(config.text, moe_num_experts=EXPERTS_EACH * instances.num_ffn_devices)
    if case.num_layers < text.num_hidden_layers:
        moe_layers = tuple(range(1, case.num_layers - 1))
        text = dataclasses.replace(text, num_hidden_layers=case.num_layers, moe_layers=moe_layers)
    return dataclasses.replace(config, text=text, vision=None)


def compile_case(case: Case) -> tuple[jax.stages.Compiled, float, float]:
    """The decode loop of a role, and the processor's seconds of lowering and of compiling it."""
    config = make_config(case)
    text, instances = config.text, parse_topology(case.spec)
    devices = gpu_compile.h100_mesh((instances.num_devices,)).devices.reshape(-1).tolist()
    topology = AfdTopology.of(instances, devices=devices)
    placed = place_shapes(abstract_model(config), topology)
    parts = take_apart(arrange(placed, Arrangement.of("gpu", config.dtype)))
    form, dtype = PayloadFormat.of(text, "fp8"), jnp.dtype(jnp.bfloat16)
    given = parts, text, topology, form, case.num_microbatches, dtype, None
    size, num_rows = topology.union.size, case.num_rows
    own, copies = NamedSharding(topology.union, OWN), NamedSharding(topology.union, COPY)

    def take(part: Part[nnx.Module]) -> list[jax.ShapeDtypeStruct]:
        """A role's weights as `RoleProcess` holds them."""
        shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in part.leaves]  # type: ignore[attr-defined]
        return [
            jax.ShapeDtypeStruct((size * shape[0], *shape[1:]), leaf_dtype, sharding=own)
            for shape, leaf_dtype in shapes
        ]

    def copy(tree: object) -> object:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=copies), tree)

    numbers = copy(jax.eval_shape(lambda: Numbers(jnp.int32(1), jnp.int32(0))))
    map_over = functools.partial(jax.shard_map, mesh=topology.union, check_vma=False)
    if case.role == "ffn":
        ffn = functools.partial(FfnLoop(*given).decode, num_rows=num_rows, max_steps=MAX_STEPS)
        run = map_over(ffn, in_specs=(OWN, COPY), out_specs=COPY)
        arguments, donated = ([take(part) for part in parts.ffn], numbers), ()
    else:
        attend = functools.partial(AttentionLoop(*given).decode, max_steps=MAX_STEPS)
        run = map_over(attend, in_specs=(OWN, OWN, *[COPY] * 4), out_specs=(OWN, COPY, COPY))
        width = -(-(CONTEXT + MAX_STEPS) // PAGE_SIZE)
        pages = jax.eval_shape(lambda: empty_cache(text, size * num_rows * width, "fp8"))
        cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), pages)
        batch = copy(
            jax.eval_shape(functools.partial(_make_batch, topology.num_attention * num_rows, width, text.vocab_size))
        )
        weights = AttentionWeights(take(parts.ends), [take(part) for part in parts.attention])
        leave_early = copy(jax.eval_shape(lambda: jnp.zeros((), bool)))
        arguments, donated = (weights, cache, *batch, numbers, leave_early), (1,)  # type: ignore[misc]
    begin = time.process_time()
    with jax.set_mesh(topology.union):
        lowered = jax.jit(run, donate_argnums=donated).lower(*arguments)
        middle = time.process_time()
        compiled = lowered.compile(compiler_options=exchange_options("cuda"))
    return compiled, middle - begin, time.process_time() - middle


def _make_batch(num_rows: int, width: int, vocab_size: int) -> tuple[object, object]:
    numbers = jnp.ones((num_rows,), jnp.int32)
    batch = DecodeBatch(numbers, numbers, numbers, numbers > 0, jnp.zeros((num_rows, width), jnp.int32))
    row = SamplingRow(SamplingParams(temperature=0), 1, (0, 0), ())
    return batch, sampling_batch([row], vocab_size, num_rows)


def read_ticks(text: str) -> list[Tick]:
    """The loops over ticks of a compiled program, from its text, whose instructions stand in the order of the launches."""
    ticks = []
    for body in _split_computations(text):
        starts = [place for place, line in enumerate(body) if _START.search(line) or _AT_ONCE.search(line)]
        dones = [place for place, line in enumerate(body) if _DONE.search(line) or _AT_ONCE.search(line)]
        if len(starts) != 1 or len(dones) != 1:
            continue
        kernels = {place for place, line in enumerate(body) if _MOSAIC in line and "custom-call(" in line}
        launches = {place for place, line in enumerate(body) if _is_launch(line) and place not in starts}
        if not kernels:
            # One of the exchanges after the last tick.
            continue
        beside = set(range(starts[0] + 1, dones[0]))
        scopes = {found for line in body for found in re.findall(r"layers\.[\d-]+", line)}
        ticks.append(
            Tick(" ".join(sorted(scopes)), len(kernels), len(kernels & beside), len(launches), len(launches & beside))
        )
    return ticks


def _split_computations(text: str) -> Iterable[list[str]]:
    """Lines of each computation of a program but the first one's."""
    body: list[str] = []
    for line in text.splitlines():
        if line.startswith("}"):
            yield body
            body = []
        elif line.startswith(" "):
            body.append(line)
        else:
            body = []


def _is_launch(line: str) -> bool:
    found = _INSTRUCTION.match(line)
    return found is not None and found.group(2) not in _FREE and not found.group(2).endswith(("-start", "-done"))


def compile_and_read(case: Case) -> Compiled:
    """Compiles a case, and finds its ticks."""
    compiled, lower_s, compile_s = compile_case(case)
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(case, round(lower_s, 1), round(compile_s, 1), temp_bytes, read_ticks(compiled.as_text() or ""))


def table(found: Iterable[Compiled]) -> str:
    """The results as a page."""
    lines = [
        "# AFD's decode loops as compiled for H100s",
        "",
        f"jax {jax.__version__}, without a GPU: `python -m tools.afd_schedule` writes this page and the JSON file of the",
        f"same name. Step3 in FP8 with {EXPERTS_EACH} experts on each FFN device, {SEQUENCES} sequences of {CONTEXT:,}",
        "tokens on each attention device, FP8 payload. A row is a loop of the compiled program, whose body is one tick.",
        "Kernels are those of `pallas_kernels`; launches are all launches but the exchange. Overlapped are those that lie",
        "between start and end of the exchange, in the order of the compiled program. Nothing here was run on a GPU.",
        "",
        "| devices | micro-batches | role | layers | kernels overlapped / in a tick | launches overlapped / in a tick |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        case = one.case
        lines += [
            f"| {case.spec} | {case.num_microbatches} | {case.role} | {tick.scope.removeprefix('layers.')} | "
            f"{tick.kernels_beside} / {tick.kernels} | {tick.launches_beside} / {tick.launches} |"
            for tick in one.ticks
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles all cases, or those that are chosen."""
    parser = argparse.ArgumentParser(prog="python -m tools.afd_schedule", description=__doc__)
    parser.add_argument(
        "--case", nargs=3, action="append", metavar=("XAYF", "MICROBATCHES", "ROLE"), help="(default: all)"
    )
    parser.add_argument("--layers", type=int, default=61, help="of the model (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    if gpu_compile.missing():
        parser.error(str(gpu_compile.missing()))
    chosen = args.case or [(spec, count, role) for spec, count in CASES for role in ("attention", "ffn")]
    found = []
    for spec, count, role in chosen:
        found.append(compile_and_read(Case(spec, int(count), role, args.layers)))
        print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    if args.out is not None:
        rows = [dataclasses.asdict(one) for one in found]
        write(args.out.with_suffix(".json"), json.dumps({"jax": jax.__version__, "programs": rows}, indent=1) + "\n")
        write(args.out.with_suffix(".md"), table(found))


if __name__ == "__main__":
    main()
