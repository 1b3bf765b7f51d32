"""Recorded calls, replayed: the same tokens without the engine."""

from __future__ import annotations

import numpy as np
import pytest

from step3_jax.bench.record import PageCopies, Recording, RecordingExecutor, call_seconds, replay
from step3_jax.bench.throughput import Bench
from step3_jax.bench.workload import Lengths
from step3_jax.engine.state import DecodeCall
from step3_jax.sampling.params import SamplingParams

MIXED = [Lengths(9, 5), Lengths(200, 3), Lengths(70, 12), Lengths(1, 1), Lengths(33, 7), Lengths(64, 2)]


def tokens_of(recording: Recording, reports) -> list[int]:
    """All tokens that decode calls generated, whatever sequence they are of."""
    assert len(reports) == recording.num_decodes
    return sorted(
        int(token)
        for report in reports
        for row, count in enumerate(report.num_new)
        for token in report.tokens[row, :count]
    )


def test_recorded_calls_replay_to_the_same_tokens(bench: Bench):
    one, outputs, replayed = bench.run_round(MIXED, seed=0)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [length.output for length in MIXED]
    assert one.recording.num_prefills > 1
    expected = sorted(token for output in outputs for token in output.outputs[0].token_ids)
    assert tokens_of(one.recording, replayed.reports) == expected


def test_a_replay_waits_where_the_engine_did(bench: Bench):
    one, _, _ = bench.run_round(MIXED, seed=1)
    events = one.recording.events
    dispatched = [event.call for event in events if not event.is_wait]
    waited = [event.call for event in events if event.is_wait]
    assert dispatched == list(range(len(one.recording.calls)))
    assert sorted(waited) == dispatched
    assert all(events.index((call, False)) < events.index((call, True)) for call in dispatched)


def test_calls_can_be_made_again_one_by_one(bench: Bench):
    one, _, _ = bench.run_round(MIXED, seed=2)
    cache, seconds = call_seconds(bench.executor, one.recording, bench.executor.new_cache())
    assert len(seconds) == len(one.recording.calls)
    again = replay(bench.executor, one.recording, cache)
    assert len(again.reports) == one.recording.num_decodes


def test_copies_of_pages_are_replayed_too(bench: Bench):
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    with bench.executor.record() as recording:
        (output,) = bench.llm.generate([list(range(2, 90))], params)
    assert any(isinstance(call, PageCopies) for call in recording.calls)
    replayed = replay(bench.executor, recording, bench.executor.new_cache())
    expected = sorted(token for completion in output.outputs for token in completion.token_ids)
    assert tokens_of(recording, replayed.reports) == expected


def test_what_runs_outside_is_not_recorded(bench: Bench):
    with bench.executor.record() as recording:
        pass
    bench.generate(MIXED, seed=0)
    assert not recording.calls
    assert not recording.events


def test_a_cache_is_of_the_size_that_was_asked_for(runner):
    executor = RecordingExecutor(runner)
    with pytest.raises(ValueError, match="no cache has been allocated"):
        executor.new_cache()
    first = executor.allocate_cache(3, "float32")
    assert executor.new_cache().keys.shape == first.keys.shape


def test_the_same_compile_time_is_seen_through_the_recorder(bench: Bench, runner):
    bench.generate(MIXED, seed=0)
    assert bench.executor.compile_s == runner.compile_s
    assert bench.executor.num_traces is runner.num_traces


def test_recorded_batches_are_not_changed_by_later_steps(bench: Bench):
    with bench.executor.record() as recording:
        bench.generate(MIXED, seed=4)
    calls = [call for call in recording.calls if isinstance(call, DecodeCall)]
    kept = [np.array(call.batch.table) for call in calls]
    bench.generate(MIXED, seed=5)
    for call, table in zip(calls, kept, strict=True):
        np.testing.assert_array_equal(call.batch.table, table)
