"""An estimate of cost for a reader, and for scripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from step3_jax.layout.hardware import Hardware
from step3_jax.planner.efficiency import base_batch
from step3_jax.planner.estimate import CostAnswer, Estimate, PartEstimate
from step3_jax.planner.published import AFD

_NOTHING_MEASURED = "nothing on a GPU: no figure of cost or speed here was measured with this project"
_PROCESSORS_MEASURED = "nothing on a GPU; with this project the shares of a processor's rates, on another than these"
_CELL = 11


def to_lines(answer: CostAnswer) -> Iterator[str]:
    """The answer as text."""
    shape, work = answer.shape, answer.work
    yield f"{shape.printed_name}, {answer.context_tokens:,} tokens of context, KV cache {answer.kv_dtype}"
    if shape.max_context_tokens is not None and answer.context_tokens > shape.max_context_tokens:
        yield f"(longer than the model's {shape.max_context_tokens:,} positions: arithmetic alone)"
    yield (
        f"one token: {work.kv_bytes / 1e6:,.0f} MB of KV cache, {work.attention_flops / 1e9:,.1f} GFLOPs of attention, "
        f"{work.projection_flops / 1e9:,.1f} of projections, {work.ffn_flops / 1e9:,.1f} of FFN"
    )
    yield ""
    rows = {_title(one): one for one in (answer.pair, *answer.one_kind)}
    label = max(len("USD per million tokens"), *map(len, rows)) + 2
    heads = ("attention", "FFN", "total", "tokens/s")
    yield f"{'USD per million tokens':<{label + 8}}" + "".join(f"{head:>{_CELL}}" for head in heads) + "  bound by"
    for title, one in rows.items():
        yield from _rows(title, one, label)
    yield ""
    yield from _notes(answer)


def to_dict(answer: CostAnswer) -> dict[str, object]:
    """The answer as a JSON object: USD per million tokens, FLOPs and bytes of one token, tokens per second and device."""
    shape, work, pair = answer.shape, answer.work, answer.pair
    return {
        "model": shape.name,
        "model_source": shape.source,
        "model_inferred": shape.inferred or None,
        "context_tokens": answer.context_tokens,
        "kv_dtype": answer.kv_dtype,
        "kv_bytes_per_token": work.kv_bytes,
        "attention_flops_per_token": work.attention_flops,
        "projection_flops_per_token": work.projection_flops,
        "ffn_flops_per_token": work.ffn_flops,
        **_estimate_dict(pair),
        "one_kind": [_estimate_dict(one) for one in answer.one_kind],
        "ranked_by": "usd" if answer.is_by_price else "tokens_per_s",
        "measured": {
            "own": [figure for own in answer.measurements for figure in own.figures],
            "note": _measured(answer),
        },
        "hardware": {hardware.name: _hardware_dict(hardware, answer) for hardware in _hardware_of(answer)},
    }


def describe_measured(hardware: Iterable[Hardware]) -> str:
    """What this project measured of the figures for some hardware, where the user has measured nothing."""
    return _PROCESSORS_MEASURED if any(one.is_host for one in hardware) else _NOTHING_MEASURED


def _title(one: Estimate) -> str:
    if one.arrangement == AFD:
        return f"apart (AFD) {one.attention.hardware.name} + {one.ffn.hardware.name}"
    return f"one kind (EP) {one.attention.hardware.name}"


def _rows(title: str, one: Estimate, label: int) -> Iterator[str]:
    bounds = f"  attention {one.attention.bound_by}, FFN {one.ffn.bound_by}"
    for kind, tokens_per_s, cells in (
        ("ideal", one.ideal_tokens_per_s, (one.attention.ideal_usd, one.ffn.ideal_usd, one.ideal_usd)),
        ("expected", one.expected_tokens_per_s, (one.attention.expected_usd, one.ffn.expected_usd, one.expected_usd)),
    ):
        money = "".join(f"{'-' if usd is None else format(usd, '.3f'):>{_CELL}}" for usd in cells)
        head = f"{title if kind == 'ideal' else '':<{label}}{kind:<8}"
        yield f"{head}{money}{tokens_per_s:>{_CELL},.0f}{bounds if kind == 'ideal' else ''}"


def _notes(answer: CostAnswer) -> Iterator[str]:
    pair = answer.pair
    batch = base_batch(pair.arrangement, answer.kv_dtype)
    yield "tokens/s: of one device, where the pools are in proportion to their work."
    yield (
        f"Expected: shares of a roofline that reads weights once for each micro-batch, {batch.tokens:,.0f} tokens "
        f"in all and {batch.kv_bytes_per_device / 1e9:,.1f} GB of KV cache on each attention device."
    )
    for name, part in (("attention", pair.attention), ("FFN", pair.ffn)):
        yield f"  {name} on {part.hardware.name}: {part.share.value:.0%}. {part.share.source}"
    yield f"Measured: {_measured(answer)}"
    for own in answer.measurements:
        yield from (f"  {figure} ({own.hardware.name})" for figure in own.figures)
    for hardware in _hardware_of(answer):
        price = answer.prices.usd_per_hour(hardware)
        cost = (
            "no price (--price gives one)"
            if price is None
            else f"{price:g} USD an hour ({answer.prices.source(hardware)})"
        )
        peak = "fp8_tflops" if hardware.fp8_tflops is not None else "bf16_tflops"
        rate = hardware.fp8_tflops if hardware.fp8_tflops is not None else hardware.bf16_tflops
        peak_source = hardware.sources.get(peak, "its file")
        yield f"  {hardware.name}: {cost}; {rate:,.0f} TFLOP/s and {hardware.bandwidth_tb_s:g} TB/s ({peak_source})"
    if not answer.is_by_price:
        yield "Ranked by tokens/s, as a price is missing: give it with --price NAME=USD"
    if answer.shape.inferred:
        yield f"Of the model inferred, not seen in a file: {answer.shape.inferred}"


def _measured(answer: CostAnswer) -> str:
    if not answer.measurements:
        return describe_measured(_hardware_of(answer))
    return "; ".join(own.source for own in answer.measurements)


def _hardware_of(answer: CostAnswer) -> list[Hardware]:
    parts = [answer.pair.attention, answer.pair.ffn, *(one.attention for one in answer.one_kind)]
    return list({part.hardware.name: part.hardware for part in parts}.values())


def _hardware_dict(hardware: Hardware, answer: CostAnswer) -> dict[str, object]:
    return {
        "usd_per_hour": answer.prices.usd_per_hour(hardware),
        "usd_per_hour_source": answer.prices.source(hardware),
        "bandwidth_tb_s": hardware.bandwidth_tb_s,
        "bf16_tflops": hardware.bf16_tflops,
        "fp8_tflops": hardware.fp8_tflops,
        "sources": dict(hardware.sources),
    }


def _estimate_dict(one: Estimate) -> dict[str, object]:
    found: dict[str, object] = {
        "arrangement": "afd" if one.arrangement == AFD else "ep",
        "attention_hardware": one.attention.hardware.name,
        "ffn_hardware": one.ffn.hardware.name,
    }
    parts: Mapping[str, PartEstimate] = {"attention": one.attention, "ffn": one.ffn}
    for name, part in parts.items():
        found |= {
            f"{name}_usd_per_million_tokens": part.ideal_usd,
            f"{name}_bound_by": part.bound_by,
            f"expected_{name}_usd_per_million_tokens": part.expected_usd,
            f"expected_{name}_share": part.share.value,
            f"expected_{name}_share_source": part.share.source,
            f"expected_{name}_share_is_measured": part.share.is_measured,
        }
    return found | {
        "total_usd_per_million_tokens": one.ideal_usd,
        "expected_total_usd_per_million_tokens": one.expected_usd,
        "tokens_per_s_per_device": one.ideal_tokens_per_s,
        "expected_tokens_per_s_per_device": one.expected_tokens_per_s,
    }
