"""Loads a checkpoint on a CPU, answers a prompt, and times each layer's decode step: full width without full depth.

    python -m tools.make_checkpoint DST --preset step3-fp8 --text-only --layers 3 --dense 1   # 15 GB
    python -m tools.time_layers DST --json out.json
    python -m tools.time_layers DST --load-format mmap

Each half of a layer is a separate call, for one token, with experts drawn afresh for each call, so that weights come from
memory. What 61 layers would take is summed over the layers of each kind and marked as predicted: it leaves out
attention over a context, sampling, and the calls that one program for all layers saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from step3_jax.bench.machine import conditions, cpu_pressure
from step3_jax.bench.yardstick import read_meter
from step3_jax.checkpoint.inspect import inspect_checkpoint
from step3_jax.checkpoint.load import load_model
from step3_jax.config import ModelConfig
from step3_jax.cpu_count import count_cpus
from step3_jax.cpu_kernels.loader import describe_kernels
from step3_jax.engine.llm import LLM
from step3_jax.layers.attention import attention_context
from step3_jax.layers.router import Routing
from step3_jax.layout.weight_form import LOAD_FORMATS, QUANTIZATIONS
from step3_jax.model.cpu import find_model_kernels, prepare_for_cpu
from step3_jax.model.step3 import Step3
from step3_jax.model.text import AttentionBlock, FfnBlock
from step3_jax.sampling.params import SamplingParams

Run = Callable[[int], Array]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One half of a layer, or the head.

    Attributes:
      name: Which half.
      milliseconds: Median of the calls.
      read_bytes: Bytes of weights, as they are stored.
    """

    name: str
    milliseconds: float
    read_bytes: int

    @property
    def gb_s(self) -> float:
        """Weights read per second, in GB."""
        return self.read_bytes / self.milliseconds / 1e6


def time_layers(model: Step3, repeats: int) -> list[Timing]:
    """Times both halves of each layer and the head, one token per call."""
    text, config = model.text, model.config.text
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, 1, config.hidden_size)), text.dtype)
    found = []
    for index, layer in enumerate(text.layers):
        found.append(
            _measure(f"attention {index}", _attention(layer.attention, hidden, model), layer.attention, repeats)
        )
        name, share = f"dense {index}", 1.0
        if layer.ffn.moe is not None:
            name, share = f"experts {index}", config.moe_top_k / config.moe_num_experts
        choices = [rng.choice(config.moe_num_experts, config.moe_top_k, False) for _ in range(repeats + 1)]
        found.append(_measure(name, _ffn(layer.ffn, hidden[0], choices), layer.ffn, repeats, share))
    found.append(_measure("head", _head(text.lm_head, hidden[0]), text.lm_head, repeats))
    return found


def predict_s(timings: Sequence[Timing], num_layers: int, num_moe: int) -> float | None:
    """Seconds per token in a model with these layers, from the medians of each kind; None if a kind was not timed."""
    kinds: dict[str, list[float]] = {}
    for one in timings:
        kinds.setdefault(one.name.split()[0], []).append(one.milliseconds)
    needed = {"attention": num_layers, "dense": num_layers - num_moe, "experts": num_moe, "head": 1}
    if any(count and kind not in kinds for kind, count in needed.items()):
        return None
    return sum(count * statistics.median(kinds[kind]) for kind, count in needed.items() if count) / 1000


def answer(model: Step3, num_tokens: int) -> tuple[list[int], float]:
    """Token ids after a short prompt, and seconds per token of the last call, when everything is compiled."""
    llm = LLM.from_model(model, max_num_seqs=1, max_model_len=128, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(2, 10))}
    llm.generate(prompt, params)
    begin = time.perf_counter()
    output = llm.generate(prompt, params)[0]
    return list(output.outputs[0].token_ids), (time.perf_counter() - begin) / num_tokens


def _measure(name: str, run: Run, module: nnx.Module, repeats: int, expert_share: float = 1.0) -> Timing:
    run(0).block_until_ready()
    times = []
    for number in range(1, repeats + 1):
        begin = time.perf_counter()
        run(number).block_until_ready()
        times.append(time.perf_counter() - begin)
    read = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(variable.get_value()))
        read += size * (expert_share if "moe" in path else 1.0)
    return Timing(name, statistics.median(times) * 1000, int(read))


def _attention(block: AttentionBlock, hidden: Float[Array, "1 1 D"], model: Step3) -> Run:
    graphdef, state = nnx.split(block)

    @jax.jit
    def call(state: nnx.State, hidden: Float[Array, "1 1 D"]) -> Array:
        out = nnx.merge(graphdef, state)(hidden, attention_context(model.config.text, (1, 1)))
        return out.residual + out.normed[None]

    return lambda _: call(state, hidden)


def _ffn(block: FfnBlock, hidden: Float[Array, "1 D"], choices: Sequence[np.ndarray]) -> Run:
    graphdef, state = nnx.split(block)

    @jax.jit
    def call(state: nnx.State, hidden: Float[Array, "1 D"], experts: Array) -> Array:
        weights = jnp.full(experts.shape, 0.3, jnp.float32)
        return nnx.merge(graphdef, state)(hidden, Routing(weights, experts, jnp.zeros((1, 1), jnp.float32)))

    return lambda number: call(state, hidden, choices[number][None].astype(np.int32))


def _head(head: nnx.Module, hidden: Float[Array, "1 D"]) -> Run:
    graphdef, state = nnx.split(head)
    call = jax.jit(lambda state, hidden: nnx.merge(graphdef, state)(hidden))
    return lambda _: call(state, hidden)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="time_layers", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", metavar="DIR", help="checkpoint in the released layout")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="(default: %(default)s)")
    parser.add_argument("--load-format", choices=LOAD_FORMATS, default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="calls of each half (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="to generate (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        found = _run(arguments)
    except (ValueError, OSError) as error:
        print(f"time_layers: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, object]:
    stored = inspect_checkpoint(arguments.model).num_bytes
    read_gb_s = read_meter(count_cpus())() / 1e9
    begin = time.perf_counter()
    model = load_model(
        arguments.model, "float32", quantization=arguments.quantization, load_format=arguments.load_format
    )
    model = prepare_for_cpu(model, find_model_kernels("float32"))
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    load_s = time.perf_counter() - begin
    print(f"loaded {stored / 1e9:.2f} GB in {load_s:.1f} s; {describe_kernels()}; reads {read_gb_s:.1f} GB/s")
    timings = time_layers(model, arguments.repeats)
    for one in timings:
        print(f"{one.name:<14} {one.milliseconds:9.3f} ms {one.read_bytes / 1e6:10.1f} MB {one.gb_s:7.1f} GB/s")
    full = ModelConfig.preset("step3").text
    predicted = predict_s(timings, full.num_hidden_layers, len(full.moe_layers))
    if predicted is not None:
        print(f"predicted, {full.num_hidden_layers} layers of this width: {1 / predicted:.2f} tokens/s")
    ids, step_s = answer(model, arguments.tokens)
    print(f"answer {ids}, {step_s * 1000:.1f} ms per token")
    return {
        "conditions": conditions()
        | {"pressure": cpu_pressure(), "read_gb_s": read_gb_s, "kernels": describe_kernels()},
        "stored_bytes": stored,
        "load_s": load_s,
        "layers": [dataclasses.asdict(one) | {"gb_s": one.gb_s} for one in timings],
        "predicted_tokens_per_s": None if predicted is None else 1 / predicted,
        "answer": ids,
        "step_ms": step_s * 1000,
    }


if __name__ == "__main__":
    sys.exit(main())
