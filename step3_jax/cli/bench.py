"""`step3 bench`: speed on this machine, as ratios measured in one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from step3_jax.bench.machine import conditions, cpu_pressure, num_threads
from step3_jax.bench.report import format_report
from step3_jax.cli.afd_option import AfdChoice
from step3_jax.cli.bench_decode import (
    Ours,
    TorchPeer,
    active_parameters,
    bench_config,
    check_agreement,
    prefill_flops,
    prefill_products,
    product_rate,
    random_model,
    read_meter,
)
from step3_jax.cli.bench_engine import run_engine_bench
from step3_jax.cli.bench_engine_option import add_engine_benches
from step3_jax.cli.engine import add_engine, read_engine
from step3_jax.config import DTYPES, ModelConfig
from step3_jax.model.step3 import Step3
from step3_jax.sharding import Parallel

# Hidden size and layers. "100m" has 109M active parameters of 309M in all: more bytes than any cache holds.
PRESETS = {"100m": (1024, 7), "tiny": (128, 2)}

Row = dict[str, str | int | float]
# Seconds of each round: ours, and the peer's (empty without one).
Times = tuple[list[float], list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    decode = what.add_parser("decode", help="decode and prefill of a model with random weights")
    decode.add_argument("--preset", choices=PRESETS, default="100m", help="size of the model (default: %(default)s)")
    decode.add_argument("--hidden", type=int, metavar="N", help="hidden size, instead of the preset's")
    decode.add_argument("--layers", type=int, metavar="N", help="layers, instead of the preset's")
    decode.add_argument("--dtype", type=_names, default=list(DTYPES), metavar="A,B", help="default: float32,bfloat16")
    decode.add_argument("--batch", type=_numbers, default=[1, 4, 16], metavar="N,N", help="default: 1,4,16")
    decode.add_argument("--steps", type=int, default=16, metavar="N", help="tokens of a round (default: %(default)s)")
    decode.add_argument("--rounds", type=int, default=7, metavar="N", help="medians are over so many (default: 7)")
    decode.add_argument("--prompt", type=int, default=32, metavar="N", help="prompt tokens (default: %(default)s)")
    decode.add_argument(
        "--prefill", type=int, default=512, metavar="N", help="tokens of prefill (default: %(default)s)"
    )
    add_engine(decode, ("devices",))
    decode.add_argument("--torch", action="store_true", help="measure PyTorch too, on the same weights")
    decode.add_argument("--torch-python", metavar="PATH", help="interpreter that has torch and numpy; implies --torch")
    decode.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    add_engine_benches(what, PRESETS, numbers=_numbers, dtypes=_names)


def run(arguments: argparse.Namespace) -> int:
    """Measures, and prints tables.

    Raises:
      ValueError: For sizes that cannot be, a peer that does not start, or logits that differ from the peer's.
    """
    if arguments.what != "decode":
        return run_engine_bench(arguments, *PRESETS[arguments.preset])
    for name in ("steps", "rounds", "prompt", "prefill"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; at least 1 is needed")
    hidden_size, num_layers = PRESETS[arguments.preset]
    config = bench_config(arguments.hidden or hidden_size, num_layers if arguments.layers is None else arguments.layers)
    longest = max(arguments.prompt + arguments.steps * (arguments.rounds + 1) + 1, arguments.prefill + 1)
    if longest > config.text.max_position_embeddings:
        raise ValueError(
            f"{longest} tokens are needed, at most {config.text.max_position_embeddings} are allowed: lower --steps, "
            "--rounds, --prompt or --prefill"
        )
    devices = read_engine(arguments)
    found = measure_decode(
        config,
        dtypes=arguments.dtype,
        batches=arguments.batch,
        steps=arguments.steps,
        rounds=arguments.rounds,
        prompt_length=arguments.prompt,
        prefill_length=arguments.prefill,
        torch_python=arguments.torch_python or (sys.executable if arguments.torch else None),
        parallel=devices.parallel,
        afd=devices.afd,
    )
    print(format_report(found))
    if arguments.json:
        target = pathlib.Path(arguments.json)
        new = target.with_name(target.name + ".new")
        new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        new.replace(target)
    return 0


def measure_decode(
    config: ModelConfig,
    *,
    dtypes: Sequence[str],
    batches: Sequence[int],
    steps: int,
    rounds: int,
    prompt_length: int,
    prefill_length: int,
    torch_python: str | None = None,
    parallel: Parallel | None = None,
    afd: AfdChoice | None = None,
) -> dict[str, object]:
    """Decode and prefill of a random model; each round measures every side once, so that they share its conditions.

    Args:
      config: The model.
      dtypes: Of weights and activations; the same values, rounded.
      batches: Sequences at once.
      steps: Tokens of a round.
      rounds: Rounds; figures are medians over them.
      prompt_length: Tokens before the first decoded one.
      prefill_length: Tokens of the prefill figure.
      torch_python: Interpreter of the PyTorch peer; None measures without.
      parallel: How the model is spread over several devices; one device if None.
      afd: Devices of attention and of the FFN, if they are apart.

    Returns:
      `conditions`, `model`, `read_gb_per_s`, and rows of `decode` and `prefill`, as JSON takes them.
    """
    before = cpu_pressure()
    model = random_model(config)
    rng = np.random.default_rng(0)
    sides = {name: Ours(_cast(model, name), parallel, afd) for name in dtypes}
    read = read_meter(num_threads())
    rates: list[float] = []
    decode_rows: list[Row] = []
    prefill_rows: list[Row] = []
    agreement: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        peer = None
        if torch_python is not None:
            peer = stack.enter_context(TorchPeer(torch_python, model, dtypes, num_threads()))
            ids = rng.integers(2, config.text.vocab_size, (2, 24))
            agreement = {name: check_agreement(side, peer, name, ids) for name, side in sides.items()}
        for batch in batches:
            ids = rng.integers(2, config.text.vocab_size, (batch, prompt_length))
            times = _decode_times(sides, peer, ids, steps, rounds, lambda: rates.append(read()))
            decode_rows += [_decode_row(config, name, batch, steps, *times[name]) for name in dtypes]
        ids = rng.integers(2, config.text.vocab_size, (1, prefill_length))
        for name, side in sides.items():
            products = prefill_products(config.text, prefill_length)
            gemm, *seconds = _prefill_times(side, peer, name, ids, rounds, products)
            prefill_rows.append(_prefill_row(config, name, prefill_length, gemm, *seconds))
        versions = peer.versions if peer is not None else {}
    read_rate = statistics.median(rates)
    for row in decode_rows:
        row["share_of_read"] = float(row["gb_per_s"]) * 1e9 / read_rate
    layers, head = active_parameters(config.text)
    return {
        "conditions": conditions()
        | {
            "cpu_pressure_before": before,
            "cpu_pressure_after": cpu_pressure(),
            "steps": steps,
            "rounds": rounds,
            "prompt": prompt_length,
            "devices": "1" if parallel is None else str(parallel),
        }
        | versions,
        "model": {
            "hidden_size": config.text.hidden_size,
            "layers": config.text.num_hidden_layers,
            "active_parameters": layers + head,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1])),
        },
        "read_gb_per_s": read_rate / 1e9,
        "logits_error": agreement,
        "decode": decode_rows,
        "prefill": prefill_rows,
    }


def _decode_times(
    sides: Mapping[str, Ours],
    peer: TorchPeer | None,
    ids: Int[np.ndarray, "B T"],
    steps: int,
    rounds: int,
    measure_read: Callable[[], None],
) -> dict[str, Times]:
    """Every side once a round, after a round that is not counted."""
    times: dict[str, Times] = {name: ([], []) for name in sides}
    room = steps * (rounds + 1)
    for name, side in sides.items():
        side.prefill(ids, room)
        side.decode(steps)
        if peer is not None:
            peer.prefill(name, ids, room)
            peer.decode(name, steps)
    for _ in range(rounds):
        measure_read()
        for name, side in sides.items():
            times[name][0].append(side.decode(steps))
            if peer is not None:
                times[name][1].append(peer.decode(name, steps))
    return times


def _prefill_times(
    side: Ours,
    peer: TorchPeer | None,
    dtype: str,
    ids: Int[np.ndarray, "B T"],
    rounds: int,
    products: Mapping[tuple[int, int, int], int],
) -> tuple[float, list[float], list[float]]:
    """The better rate of the bare products before and after, and the times between."""
    side.prefill(ids, 1)
    gemm = product_rate(dtype, products)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        ours.append(side.prefill(ids, 1))
        if peer is not None:
            theirs.append(peer.prefill(dtype, ids, 1))
    return max(gemm, product_rate(dtype, products)), ours, theirs


def _decode_row(
    config: ModelConfig, dtype: str, batch: int, steps: int, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    step = statistics.median(ours) / steps
    # On a CPU the engine holds every model in float32.
    held = "float32" if jax.default_backend() == "cpu" else dtype
    num_bytes = sum(active_parameters(config.text, batch)) * jnp.dtype(held).itemsize
    row: Row = {
        "dtype": dtype,
        "batch": batch,
        "tokens_per_s": batch / step,
        "step_ms": step * 1e3,
        "step_mb": num_bytes / 1e6,
        "gb_per_s": num_bytes / step / 1e9,
    }
    if theirs:
        row["torch_tokens_per_s"] = batch * steps / statistics.median(theirs)
        row["times_torch"] = statistics.median([peer / own for own, peer in zip(ours, theirs, strict=True)])
    return row


def _prefill_row(
    config: ModelConfig, dtype: str, length: int, gemm: float, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    seconds = statistics.median(ours)
    flops = prefill_flops(config.text, length) / seconds
    row: Row = {
        "dtype": dtype,
        "tokens": length,
        "tokens_per_s": length / seconds,
        "gflop_per_s": flops / 1e9,
        "gemm_gflop_per_s": gemm / 1e9,
        "share_of_gemm": flops / gemm,
    }
    if theirs:
        row["torch_tokens_per_s"] = length / statistics.median(theirs)
        row["times_torch"] = statistics.median([peer / own for own, peer in zip(ours, theirs, strict=True)])
    return row


def _cast(model: Step3, dtype: str) -> Step3:
    """The same weights, rounded to `dtype`."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(DTYPES)}, separated by commas")
    return names


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; whole numbers of at least 1 are needed, separated by commas")
    return numbers
