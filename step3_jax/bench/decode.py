"""What `step3 bench decode` measures: decode and prefill of a random model, next to yardsticks and a PyTorch peer."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from step3_jax.afd.executor import AfdChoice
from step3_jax.bench.loop import Ours
from step3_jax.bench.machine import conditions, cpu_pressure
from step3_jax.bench.model import PLAIN_FORMS, hold_as, random_model, weight_sizes
from step3_jax.bench.peer import TorchPeer, check_agreement
from step3_jax.bench.yardstick import prefill_products, product_rate, read_meter
from step3_jax.config import ModelConfig
from step3_jax.cpu_count import count_cpus
from step3_jax.layout.count import active_parameters, prefill_flops
from step3_jax.layout.parallel import Parallel
from step3_jax.model.step3 import Step3

Row = dict[str, str | int | float]
# Dtype and form of the weights.
Side = tuple[str, str]
# Seconds of each round: ours by side, and the peer's by dtype (empty without one).
Times = tuple[dict[Side, list[float]], dict[str, list[float]]]


def measure_decode(
    config: ModelConfig,
    *,
    dtypes: Sequence[str],
    quantizations: Sequence[str] = ("stored",),
    batches: Sequence[int],
    steps: int,
    rounds: int,
    prompt_length: int,
    prefill_length: int,
    torch_python: str | None = None,
    parallel: Parallel | None = None,
    afd: AfdChoice | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, object]:
    """Decode and prefill of a random model; each round measures every side once, so that they share its conditions.

    If interrupted, it returns what is complete by then.

    Args:
      config: The model.
      dtypes: Dtypes of weights and activations; the same values, rounded.
      quantizations: Forms of weights to measure for each dtype, see `model.hold_as`.
      batches: Sequences at once.
      steps: Tokens of a round.
      rounds: Rounds; figures are medians over them.
      prompt_length: Tokens before the first decoded one.
      prefill_length: Tokens of the prefill figure.
      torch_python: Interpreter of the PyTorch peer; None measures without it.
      parallel: How the model is spread over several devices; one device if None.
      afd: Devices of attention and of the FFN, if they are separate.
      tell: Called with a line of text about each part before it is measured.

    Returns:
      `is_partial`, `conditions`, `model`, `read_gb_per_s` (None if nothing was measured), and rows of `decode` and
      `prefill`, as JSON takes them.

    Raises:
      ValueError: For several dtypes with several processes.
    """
    if jax.process_count() > 1 and len(dtypes) > 1:
        raise ValueError(f"several processes measure one dtype at a time: give one of {', '.join(dtypes)}")
    before = cpu_pressure()
    tell("making a model with random weights ...")
    model = random_model(config)
    rng = np.random.default_rng(0)
    sides = {
        (name, form): Ours(hold_as(_cast(model, name), form), parallel, afd)
        for name in dtypes
        for form in quantizations
    }
    read = read_meter(count_cpus())
    rates: list[float] = []
    decode_rows: list[Row] = []
    prefill_rows: list[Row] = []
    agreement: dict[str, float] = {}
    versions: dict[str, object] = {}
    with _Interruptible() as measuring, contextlib.ExitStack() as stack:
        peer = None
        if torch_python is not None:
            tell("starting PyTorch, and comparing logits ...")
            peer = stack.enter_context(TorchPeer(torch_python, model, dtypes, count_cpus()))
            ids = rng.integers(2, config.text.vocab_size, (2, 24))
            versions = peer.versions
            # Quantised weights are other weights.
            agreement = {
                name: check_agreement(side, peer, name, ids)
                for (name, form), side in sides.items()
                if form in PLAIN_FORMS
            }
        for batch in batches:
            tell(f"decode, batch {batch}: {rounds} rounds of {steps} tokens in {_name_sides(sides)} ...")
            ids = rng.integers(2, config.text.vocab_size, (batch, prompt_length))
            times = _decode_times(sides, peer, ids, steps, rounds, lambda: rates.append(read()))
            decode_rows += [_decode_row(config, side, batch, steps, *times) for side in sides]
        ids = rng.integers(2, config.text.vocab_size, (1, prefill_length))
        for names, side in sides.items():
            tell(f"prefill, {prefill_length} tokens in {' '.join(names)}: {rounds} rounds ...")
            products = prefill_products(config.text, prefill_length)
            gemm, *seconds = _prefill_times(side, peer, names[0], ids, rounds, products)
            prefill_rows.append(_prefill_row(config, names, prefill_length, gemm, *seconds))
    read_rate = statistics.median(rates) if rates else None
    if read_rate is not None:
        for row in decode_rows:
            row["share_of_read"] = float(row["gb_per_s"]) * 1e9 / read_rate
    layers, head = active_parameters(config.text)
    return {
        "is_partial": measuring.was_interrupted,
        "conditions": conditions(jax.devices()[0].device_kind)
        | {
            "cpu_pressure_before": before,
            "cpu_pressure_after": cpu_pressure(),
            "steps": steps,
            "rounds": rounds,
            "prompt": prompt_length,
            "devices": _describe_devices(parallel, afd),
        }
        | versions,
        "model": {
            "hidden_size": config.text.hidden_size,
            "layers": config.text.num_hidden_layers,
            "active_parameters": layers + head,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1])),
        },
        "read_gb_per_s": None if read_rate is None else read_rate / 1e9,
        "logits_error": agreement,
        "decode": decode_rows,
        "prefill": prefill_rows,
    }


class _Interruptible:
    """A context that an interrupt ends without ending what follows it."""

    was_interrupted = False

    def __enter__(self) -> _Interruptible:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.was_interrupted = isinstance(error, KeyboardInterrupt)
        return self.was_interrupted


def _name_sides(sides: Mapping[Side, Ours]) -> str:
    return ", ".join(" ".join(names) for names in sides)


def _describe_devices(parallel: Parallel | None, afd: AfdChoice | None) -> str:
    """Number and kind of the devices that were measured, and how they share the work."""
    if afd is not None:
        devices, how = list(afd.topology.devices), f" as {afd.topology.instances.spec}"
    else:
        devices = jax.devices()[: 1 if parallel is None else parallel.num_devices]
        how = "" if parallel is None else f" as {parallel}"
    return f"{len(devices)} x {devices[0].device_kind}{how}"


def _decode_times(
    sides: Mapping[Side, Ours],
    peer: TorchPeer | None,
    ids: Int[np.ndarray, "B T"],
    steps: int,
    rounds: int,
    measure_read: Callable[[], None],
) -> Times:
    """Every side once per round, after a round that is not counted."""
    ours: dict[Side, list[float]] = {names: [] for names in sides}
    theirs: dict[str, list[float]] = {dtype: [] for dtype, _ in sides} if peer is not None else {}
    room = steps * (rounds + 1)
    for side in sides.values():
        side.prefill(ids, room)
        side.decode(steps)
    if peer is not None:
        for dtype in theirs:
            peer.prefill(dtype, ids, room)
            peer.decode(dtype, steps)
    for _ in range(rounds):
        measure_read()
        for names, side in sides.items():
            ours[names].append(side.decode(steps))
        if peer is not None:
            for dtype, seconds in theirs.items():
                seconds.append(peer.decode(dtype, steps))
    return ours, theirs


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
    config: ModelConfig,
    side: Side,
    batch: int,
    steps: int,
    all_ours: Mapping[Side, Sequence[float]],
    all_theirs: Mapping[str, Sequence[float]],
) -> Row:
    dtype, form = side
    ours, theirs = all_ours[side], all_theirs.get(dtype, ())
    step = statistics.median(ours) / steps
    layers, head = active_parameters(config.text, batch)
    num_bytes = sum(size * count for size, count in zip(weight_sizes(dtype, form), (layers, head), strict=True))
    row: Row = {
        "dtype": dtype,
        "quantization": form,
        "batch": batch,
        "tokens_per_s": batch / step,
        "step_ms": step * 1e3,
        "step_mb": num_bytes / 1e6,
        "gb_per_s": num_bytes / step / 1e9,
    }
    if theirs:
        row["torch_tokens_per_s"] = batch * steps / statistics.median(theirs)
        row["times_torch"] = statistics.median([peer / own for own, peer in zip(ours, theirs, strict=True)])
        best = min(all_theirs.values(), key=statistics.median)
        row["times_best_torch"] = statistics.median([peer / own for own, peer in zip(ours, best, strict=True)])
    return row


def _prefill_row(
    config: ModelConfig, side: Side, length: int, gemm: float, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    seconds = statistics.median(ours)
    flops = prefill_flops(config.text, length) / seconds
    row: Row = {
        "dtype": side[0],
        "quantization": side[1],
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
