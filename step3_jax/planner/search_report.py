"""The results of a search, for a reader and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from step3_jax.planner.candidate import Candidate, Pool
from step3_jax.planner.cost_table import describe_measured
from step3_jax.planner.query import FIRST_TOKEN_TARGET, MEMORY, Found, Query, Speed
from step3_jax.planner.search import Answer

_HEADS = ("", "deployment", "devices", "sequences", "ms/token", "s/first", "tokens/s/user", "tokens/s/device", "USD/1M")
_LEFT = 3


def to_lines(answer: Answer, seconds: float) -> Iterator[str]:
    """The answer as text.

    Args:
      answer: The results.
      seconds: Time of the search.
    """
    query = answer.query
    yield from _describe_query(query)
    yield (
        f"{answer.num_candidates:,} deployments with all their batches in {seconds:.1f} s, best "
        f"{'cost' if query.has_prices else 'tokens/s/device'} first; {query.judge} ({_other(query)})"
    )
    yield ""
    if answer.best:
        yield from _format_table(answer.best, query)
        yield ""
        fewest = answer.fewest
        if fewest is not None:
            yield f"fewest devices: {fewest.candidate.num_devices}, {_summarise(fewest, query)}"
    else:
        yield from _describe_failure(answer)
    yield from _describe_sources(answer)


def to_dict(answer: Answer, fronts: Mapping[str, Sequence[Found]], seconds: float) -> dict[str, object]:
    """The answer as a JSON object: seconds, USD per million tokens, tokens per second.

    Args:
      answer: The results.
      fronts: Fronts of cost against speed, by arrangement.
      seconds: Time of the search.
    """
    query = answer.query
    return {
        "target_s": query.target_s,
        "target_first_token_s": query.first_token_s,
        "judge": query.judge,
        "ranked_by": "usd" if query.has_prices else "tokens_per_s_per_device",
        "weights": query.weights,
        "kv_cache": query.kv_cache,
        "context": query.contexts.text,
        "mean_context_tokens": query.contexts.mean,
        "expert_load": query.load.source,
        "inventory": [_pool_dict(pool) for pool in query.pools],
        "meets_target": bool(answer.best),
        "best": [_found_dict(one, query) for one in answer.best],
        "fewest_devices": None if answer.fewest is None else _found_dict(answer.fewest, query),
        "nearest": None if answer.nearest is None else _found_dict(answer.nearest, query),
        "obstacle": list(answer.obstacle),
        "fronts": {name: [_found_dict(one, query) for one in front] for name, front in fronts.items()},
        "num_deployments": answer.num_candidates,
        "seconds": seconds,
        "measured": describe_measured(pool.hardware for pool in query.pools),
    }


def _describe_query(query: Query) -> Iterator[str]:
    vision = "with vision tower" if query.config.vision is not None and not query.text_only else "text only"
    yield f"weights {query.weights}, KV cache {query.kv_cache}, {vision}; {_describe_contexts(query)}"
    first = "" if query.first_token_s is None else f", {query.first_token_s:g} s to the first token"
    inventory = " + ".join(f"{pool.count} {pool.hardware.name}" for pool in query.pools)
    yield f"target: {query.target_s * 1e3:g} ms a token{first}, by {query.judge} times; inventory: {inventory}"


def _describe_contexts(query: Query) -> str:
    contexts = query.contexts
    if not contexts.deviation:
        return f"context {contexts.longest:,} tokens"
    return (
        f"contexts of {contexts.text}: {contexts.mean:,.0f} tokens on average (deviation {contexts.deviation:,.0f}), "
        f"at most {contexts.longest:,}"
    )


def _format_table(found: Sequence[Found], query: Query) -> Iterator[str]:
    rows = [_HEADS]
    for number, one in enumerate(found, start=1):
        first, second = (one.expected, one.ideal) if query.judge == "expected" else (one.ideal, one.expected)
        rows.append(
            (
                str(number),
                one.candidate.name,
                one.candidate.devices,
                f"{one.sequences:,}",
                _pair(first.step_s * 1e3, second.step_s * 1e3, ".1f"),
                _pair(first.first_token_s, second.first_token_s, ".2f"),
                _pair(first.tokens_per_s_per_user, second.tokens_per_s_per_user, ".1f"),
                _pair(first.tokens_per_s_per_device, second.tokens_per_s_per_device, ",.0f"),
                _pair_usd(first, second),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    for number, row in enumerate(rows):
        cells = [
            f"{cell:<{width}}" if column < _LEFT else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
        if number:
            one = found[number - 1]
            yield f"{'':<{widths[0] + 2}}{_describe_shards(one)}. Binds: {_describe_bound(one, query)}"


def _describe_shards(one: Found) -> str:
    parallel, count = one.candidate.parallel, one.deployment.num_microbatches
    if one.candidate.topology is None:
        return f"{parallel}"
    return f"FFN {parallel}; {count} micro-batch{'es' if count > 1 else ''}"


def _describe_bound(one: Found, query: Query) -> str:
    """The bottleneck of the step, and what limits the batch."""
    speed = one.speed(query.judge)
    if one.limit == MEMORY:
        return f"{MEMORY} for the KV cache ({one.kv_tokens:,} tokens fit); the step: {speed.binds}"
    return f"{one.limit}; the step: {speed.binds}"


def _summarise(one: Found, query: Query) -> str:
    speed = one.speed(query.judge)
    usd = "" if speed.usd_per_million_tokens is None else f", {_format_usd(speed)} USD per million tokens"
    return (
        f"{one.candidate.name} on {one.candidate.devices} with {one.sequences:,} sequences: {speed.step_s * 1e3:.1f} ms, "
        f"{speed.tokens_per_s_per_device:,.0f} tokens/s/device{usd}"
    )


def _describe_failure(answer: Answer) -> Iterator[str]:
    query, nearest = answer.query, answer.nearest
    if nearest is not None:
        speed = nearest.speed(query.judge)
        yield "NOTHING MEETS THE TARGET"
        yield f"nearest: {_summarise(nearest, query)}, {speed.first_token_s:.2f} s to the first token"
        yield f"  limit: {nearest.limit}; the step: {speed.binds}"
        wanted = f"--target-ms {speed.step_s * 1e3:.3g}"
        if nearest.limit == FIRST_TOKEN_TARGET:
            wanted = f"--target-first-token-s {speed.first_token_s:.3g}"
        yield f"  would be met: {wanted}"
    elif answer.obstacle:
        yield "NOTHING FITS THE MEMORY"
        yield f"nearest: {answer.obstacle[0]}"
        yield from (f"  would fit: {remedy}" for remedy in answer.obstacle[1:])
    else:
        yield "NO DEPLOYMENT to look at: none divides the model over these devices, or --only leaves none"


def _describe_sources(answer: Answer) -> Iterator[str]:
    query = answer.query
    shown = [*answer.best, *filter(None, (answer.fewest, answer.nearest))]
    if shown:
        yield ""
        yield "ideal: devices at their peak or bandwidth, weights read once for each micro-batch, work spread as on average"
        yield "expected: shares of the ideal that others reached, and the device that has most by chance"
    for source in dict.fromkeys(source for one in shown for source in one.expectation.sources):
        yield f"  {source}"
    yield f"experts: {query.load.source}{_describe_imbalance(shown[0], query) if shown else ''}"
    yield f"measured: {describe_measured(pool.hardware for pool in query.pools)}"
    for pool in query.pools:
        yield from _describe_hardware(pool)
    missing = [pool.given_as for pool in query.pools if pool.usd_per_hour is None]
    if missing:
        yield f"ranked by tokens/s/device, as there is no price of {missing[0]}: give it with --price {missing[0]}=USD"


def _describe_imbalance(one: Found, query: Query) -> str:
    """The load of the busiest group of experts of a deployment."""
    groups = one.candidate.parallel.expert_groups
    if groups == 1:
        return ""
    return (
        f"; of {_count_tokens(one):,} tokens the busiest of {groups} groups of experts in {one.candidate.name} gets "
        f"{_find_busiest(one, query):.2f} times the mean"
    )


def _find_busiest(one: Found, query: Query) -> float:
    """Tokens of the busiest group of experts relative to the mean group, by chance and by the load's own imbalance."""
    groups, tokens = one.candidate.parallel.expert_groups, _count_tokens(one)
    busiest = query.load.count_busiest(np.array([float(tokens)]), groups, by_chance=True)
    return float(busiest[0]) * groups / (tokens * query.load.top_k)


def _count_tokens(one: Found) -> int:
    """Tokens of a micro-batch."""
    return one.rows * one.candidate.num_attention


def _describe_hardware(pool: Pool) -> Iterator[str]:
    hardware = pool.hardware
    peak = "bf16_tflops" if hardware.fp8_tflops is None else "fp8_tflops"
    figures = (
        (f"{hardware.fp8_tflops or hardware.bf16_tflops:,.0f} TFLOP/s", peak),
        (f"{hardware.bandwidth_tb_s:g} TB/s", "bandwidth_tb_s"),
        (f"{hardware.memory_gib:g} GiB", "memory_gib"),
        (f"links {hardware.link_gb_s:g} GB/s", "link_gb_s"),
        ("no network" if hardware.network_gb_s is None else f"network {hardware.network_gb_s:g} GB/s", "network_gb_s"),
    )
    # Group figures by source.
    by_source: dict[str, list[str]] = {}
    for text, name in figures:
        by_source.setdefault(hardware.sources.get(name, "its file"), []).append(text)
    price = "no price" if pool.usd_per_hour is None else f"{pool.usd_per_hour:g} USD an hour ({pool.price_source})"
    yield f"{hardware.name}: {price}"
    yield from (f"  {', '.join(texts)} ({source})" for source, texts in by_source.items())


def _pool_dict(pool: Pool) -> dict[str, object]:
    return {
        "hardware": pool.hardware.name,
        "count": pool.count,
        "usd_per_hour": pool.usd_per_hour,
        "usd_per_hour_source": pool.price_source,
        "sources": dict(pool.hardware.sources),
    }


def _found_dict(one: Found, query: Query) -> dict[str, object]:
    candidate, shares = one.candidate, one.expectation.shares
    return {
        "deployment": candidate.name,
        "kind": candidate.kind,
        "devices": candidate.num_devices,
        "attention_hardware": candidate.attention.hardware.name,
        "attention_devices": candidate.num_attention,
        "ffn_hardware": candidate.ffn.hardware.name,
        "ffn_devices": _count_ffn(candidate),
        "parallel": {"dp": candidate.parallel.dp, "tp": candidate.parallel.tp, "ep": candidate.parallel.ep},
        "microbatches": one.deployment.num_microbatches,
        "sequences": one.sequences,
        "kv_tokens_that_fit": one.kv_tokens,
        "batch_is_limited_by": one.limit,
        "busiest_experts_over_mean": _find_busiest(one, query),
        "ideal": _speed_dict(one.ideal),
        "expected": _speed_dict(one.expected)
        | {"shares": shares._asdict(), "is_measured": one.expectation.is_measured},
    }


def _count_ffn(candidate: Candidate) -> int:
    return candidate.num_devices if candidate.topology is None else candidate.topology.num_ffn_devices


def _speed_dict(speed: Speed) -> dict[str, object]:
    return dataclasses.asdict(speed) | {"tokens_per_s_per_user": speed.tokens_per_s_per_user}


def _pair(first: float, second: float, form: str) -> str:
    return f"{first:{form}} ({second:{form}})"


def _pair_usd(first: Speed, second: Speed) -> str:
    return "-" if first.usd_per_million_tokens is None else f"{_format_usd(first)} ({_format_usd(second)})"


def _format_usd(speed: Speed) -> str:
    usd = speed.usd_per_million_tokens or 0.0
    return f"{usd:.3f}" if usd >= 0.01 else f"{usd:.2g}"


def _other(query: Query) -> str:
    return "ideal" if query.judge == "expected" else "expected"
