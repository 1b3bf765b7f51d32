"""How long a stream waits: for its first token and between tokens, alone, during a long prompt, and with a cached one."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.bench.record import Recording
from step3_jax.bench.throughput import Bench
from step3_jax.bench.workload import Lengths, random_prompts
from step3_jax.engine.state import DecodeCall, PrefillBatch
from step3_jax.sampling.params import SamplingParams

PERCENTILES = (50, 90, 99)
# Tokens that a stream gets before the long prompt arrives, and after that has its first token.
_TOKENS_AROUND = 8


def measure_alone(
    bench: Bench, *, prompt_tokens: int, output_tokens: int, rounds: int, seed: int = 0
) -> dict[str, object]:
    """One stream at a time, after one that is not counted.

    Args:
      bench: The engine; its `stream_interval` is the tokens between two pieces.
      prompt_tokens: Tokens of each stream.
      output_tokens: Tokens of each stream.
      rounds: Streams.
      seed: Seed of the prompts.

    Returns:
      Percentiles, in milliseconds, of the first token and of the time between two pieces.
    """
    first: list[float] = []
    between: list[float] = []
    prompts = random_prompts([Lengths(prompt_tokens, output_tokens)] * (rounds + 1), bench.vocab_size, seed=seed)
    for number, ids in enumerate(prompts):
        arrivals = _stream_times(bench, ids, output_tokens)
        if number:
            first.append(arrivals[0])
            between += np.diff(arrivals).tolist()
    return {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
        "first_token_ms": _percentiles(first),
        "between_tokens_ms": _percentiles(between),
    }


def measure_arrival(
    bench: Bench, *, stream_tokens: int, prompt_tokens: int, rounds: int, seed: int = 0
) -> dict[str, object]:
    """The longest that a running stream waits for its next piece while a long prompt arrives.

    Args:
      bench: The engine.
      stream_tokens: Tokens of the running stream's prompt.
      prompt_tokens: Tokens of the prompt that arrives.
      rounds: How often it arrives, after one that is not counted.
      seed: Seed of the prompts.

    Returns:
      Medians over the rounds, in milliseconds: the stream's longest wait, the longest chunk and the longest decode call
      among the same calls made again one by one, the wait over the sum of the two, and the long prompt's first token.
    """
    waits: list[float] = []
    shares: list[float] = []
    chunks: list[float] = []
    calls: list[float] = []
    firsts: list[float] = []
    usual: list[float] = []
    num_chunks = 0
    for number in range(rounds + 1):
        pair = random_prompts(
            [Lengths(stream_tokens, 1), Lengths(prompt_tokens, 1)], bench.vocab_size, seed=seed + number
        )
        with bench.executor.record() as recording:
            arrivals, arrival_s, first_s = _interrupted_stream(bench, *pair)
        chunk_s, call_s, num_chunks = _longest_calls(bench, recording)
        if not number:
            continue
        gaps = np.diff(arrivals)
        # Pieces that came after the long prompt had arrived, up to its first token and the call that made it.
        is_within = (arrivals[1:] > arrival_s) & (arrivals[:-1] < arrival_s + first_s)
        waits.append(float(gaps[is_within].max()))
        usual.append(float(np.median(gaps[~is_within])))
        chunks.append(chunk_s)
        calls.append(call_s)
        shares.append(waits[-1] / (chunk_s + call_s))
        firsts.append(first_s)
    return {
        "prompt_tokens": prompt_tokens,
        "max_num_batched_tokens": bench.config.max_num_batched_tokens,
        "rounds": rounds,
        "chunks": num_chunks,
        "longest_wait_ms": _median_ms(waits),
        "chunk_ms": _median_ms(chunks),
        "decode_call_ms": _median_ms(calls),
        "wait_over_chunk_and_call": statistics.median(shares),
        "usual_wait_ms": _median_ms(usual),
        "first_token_ms": _median_ms(firsts),
    }


def measure_cached(
    bench: Bench, *, prompt_tokens: int, cached_share: float, rounds: int, seed: int = 0
) -> dict[str, object]:
    """Time to the first token of a prompt whose first part is cached, relative to that of a new one.

    Args:
      bench: The engine, with a prefix cache.
      prompt_tokens: Tokens of the prompt.
      cached_share: Minimum share of it that is cached, in whole pages.
      rounds: Pairs, after one that is not counted.
      seed: Seed of the prompts.

    Returns:
      Medians over the rounds, in milliseconds, and of their ratio.

    Raises:
      ValueError: If this much of it cannot be cached.
    """
    num_cached = -(-int(prompt_tokens * cached_share) // PAGE_SIZE) * PAGE_SIZE
    if num_cached >= prompt_tokens:
        raise ValueError(
            f"{prompt_tokens} tokens have no {cached_share:.0%} in whole pages of {PAGE_SIZE}; a longer prompt has"
        )
    new: list[float] = []
    cached: list[float] = []
    found = 0
    for number in range(rounds + 1):
        first, second = random_prompts([Lengths(prompt_tokens, 1)] * 2, bench.vocab_size, seed=seed + number)
        # The one that fills the cache has another ending.
        bench.llm.generate(second[: num_cached + 1], _greedy(1))
        uncached_s = _stream_times(bench, first, 1)[0]
        before = bench.llm.stats.prefix_cache_hits
        cached_s = _stream_times(bench, second, 1)[0]
        found = bench.llm.stats.prefix_cache_hits - before
        if number:
            new.append(uncached_s)
            cached.append(cached_s)
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": found,
        "rounds": rounds,
        "uncached_first_token_ms": _median_ms(new),
        "cached_first_token_ms": _median_ms(cached),
        "cached_over_uncached": statistics.median(one / other for one, other in zip(cached, new, strict=True)),
    }


def _stream_times(bench: Bench, ids: Sequence[int], count: int) -> list[float]:
    """When each piece with tokens arrived, in seconds since the call."""
    begin = time.perf_counter()
    times = []
    for piece in bench.llm.generate(ids, _greedy(count), stream=True):
        if piece.token_ids:
            times.append(time.perf_counter() - begin)
    return times


def _interrupted_stream(
    bench: Bench, running: Sequence[int], arriving: Sequence[int]
) -> tuple[np.ndarray, float, float]:
    """When the pieces of a stream arrived, when a prompt arrived meanwhile, and how long that waited for its first token."""
    begin = time.perf_counter()
    found: list[float] = []

    def arrive() -> None:
        found.append(time.perf_counter() - begin)
        found.append(_stream_times(bench, arriving, 1)[0])

    thread = threading.Thread(target=arrive)
    times: list[float] = []
    num_left = _TOKENS_AROUND
    # It continues until the other has had its turn; leaving the loop ends it.
    for piece in bench.llm.generate(running, _greedy(None), stream=True):
        if not piece.token_ids:
            continue
        times.append(time.perf_counter() - begin)
        if len(times) == _TOKENS_AROUND:
            thread.start()
        num_left -= len(found) == 2
        if not num_left:
            break
    if thread.ident is not None:
        thread.join()
    if len(found) < 2:
        raise RuntimeError("the stream ended before the arriving prompt had its first token: give it a longer context")
    return np.asarray(times), found[0], found[1]


def _longest_calls(bench: Bench, recording: Recording) -> tuple[float, float, int]:
    """Seconds of the longest chunk and the longest decode call of one step, replayed separately, and the chunks."""
    pairs = list(zip(recording.calls, bench.time_calls(recording), strict=True))
    chunks = [one for call, one in pairs if isinstance(call, PrefillBatch)]
    calls = [one for call, one in pairs if isinstance(call, DecodeCall)]
    return max(chunks), max(calls), len(chunks)


def _greedy(count: int | None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{one}": float(np.percentile(seconds, one)) * 1e3 for one in PERCENTILES}


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3
