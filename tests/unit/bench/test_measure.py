"""Every figure is there and counts what it says; no test asserts a time."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from step3_jax.bench.latency import measure_alone, measure_arrival, measure_cached
from step3_jax.bench.machine import anonymous_bytes, conditions, cpu_pressure, load_average
from step3_jax.bench.report import format_report, write_section, write_sections
from step3_jax.bench.scaling import measure_memory, measure_prompts, measure_sequences
from step3_jax.bench.throughput import Bench, measure_throughput, run_static
from step3_jax.bench.workload import Lengths
from step3_jax.engine.config import EngineConfig

MIXED = [Lengths(9, 5), Lengths(150, 3), Lengths(70, 12), Lengths(1, 1), Lengths(33, 7)]


class Peer:
    """Takes a second for each call, and records what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def prefill(self, dtype: str, ids: np.ndarray, room: int) -> float:
        self.calls.append((dtype, ids.shape, room))
        return 1.0

    def decode(self, dtype: str, steps: int) -> float:
        self.calls.append((dtype, steps))
        return 1.0


def test_static_batches_are_padded_to_their_longest():
    peer = Peer()
    assert run_static(peer, "float32", MIXED, 4, 61) == 4.0
    assert peer.calls == [("float32", (4, 150), 12), ("float32", 11), ("float32", (1, 33), 7), ("float32", 6)]


def test_throughput_counts_what_was_asked_for(bench: Bench):
    peer = Peer()
    found = measure_throughput(bench, MIXED, rounds=2, peer=peer, peer_dtypes=["float32", "bfloat16"])
    assert found["requests"] == {
        "count": 5,
        "prompt_tokens": 263,
        "output_tokens": 28,
        "longest_prompt": 150,
        "longest_output": 12,
    }
    sides = {row["side"]: row for row in found["throughput"]}
    assert set(sides) == {"engine", "replay", "torch float32", "torch bfloat16"}
    for row in sides.values():
        assert row["generated_tokens_per_s"] == pytest.approx(28 / row["seconds"])
        assert row["requests_per_s"] == pytest.approx(5 / row["seconds"])
    assert len(found["rounds"]) == 2
    assert all(one["overhead"] == one["engine_s"] / one["replay_s"] for one in found["rounds"])
    assert found["counts"]["preemptions"] == 0
    assert found["counts"]["decode_calls"] > 0
    assert json.loads(json.dumps(found)) == found


def test_preemptions_of_a_small_cache_are_counted(runner):
    # Two sequences of nine pages start in nineteen, and eventually need ten each.
    page = 64 * 2 * 128 * 4
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=128, max_model_len=640, kv_cache_memory_bytes=19 * page
    )
    bench = Bench(runner, config)
    one, outputs, _ = bench.run_round([Lengths(60, 580)] * 2, seed=0)
    assert one.stats.num_preemptions > 0
    assert all(len(output.outputs[0].token_ids) == 580 for output in outputs)


def test_a_stream_alone_has_a_time_for_each_token(bench: Bench):
    found = measure_alone(bench, prompt_tokens=20, output_tokens=6, rounds=2)
    for name in ("first_token_ms", "between_tokens_ms"):
        assert set(found[name]) == {"p50", "p90", "p99"}
        assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]


def test_a_long_prompt_arrives_in_chunks_beside_a_stream(bench: Bench):
    found = measure_arrival(bench, stream_tokens=10, prompt_tokens=500, rounds=1)
    # One of the stream's own prompt, and those of 499 tokens in chunks of 128.
    assert found["chunks"] == 5
    assert found["longest_wait_ms"] > 0
    assert found["wait_over_chunk_and_call"] == pytest.approx(
        found["longest_wait_ms"] / (found["chunk_ms"] + found["decode_call_ms"])
    )


def test_the_cached_part_of_a_prompt_is_whole_pages(bench: Bench):
    found = measure_cached(bench, prompt_tokens=300, cached_share=0.8, rounds=1)
    assert found["cached_tokens"] == 256
    assert found["cached_over_uncached"] > 0


def test_a_prompt_without_so_many_whole_pages_is_refused(bench: Bench):
    with pytest.raises(ValueError, match="a longer prompt"):
        measure_cached(bench, prompt_tokens=60, cached_share=0.9, rounds=1)


def test_scaling_has_a_row_for_each_size(runner, bench: Bench):
    def make_bench(count: int) -> Bench:
        return Bench(runner, EngineConfig(max_num_seqs=count, max_num_batched_tokens=128))

    sequences = measure_sequences(make_bench, [1, 4], Lengths(8, 4), rounds=1)
    assert [row["sequences"] for row in sequences] == [1, 4]
    prompts = measure_prompts(bench, [16, 300], rounds=1)
    assert [row["chunks"] for row in prompts] == [1, 3]
    memory = measure_memory(bench, [Lengths(8, 2), Lengths(5, 1)], counts=[3, 7], warm_up=2)
    assert [row["requests"] for row in memory] == [3, 7]
    assert all(row["anonymous_mib_most"] is None or row["anonymous_mib_most"] > 0 for row in memory)


def test_the_machine_says_what_it_is():
    found = conditions()
    assert found["cpu"]
    assert found["threads"] >= 1
    for value in (anonymous_bytes(), cpu_pressure(), load_average()):
        assert value is None or value >= 0


def test_sections_stand_beside_each_other_in_the_file(tmp_path: pathlib.Path):
    file = tmp_path / "engine.json"
    write_section(file, "latency", {"x": 1.5})
    write_section(file, "throughput", {"y": None})
    write_sections(file, {"latency": {"x": 2}, "rows": [1]})
    assert json.loads(file.read_text()) == {"latency": {"x": 2}, "throughput": {"y": None}, "rows": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"engine\.json"):
        write_section(file, "latency", {})


def test_the_report_has_values_objects_and_tables():
    text = format_report(
        {
            "ratio": 1.04567,
            "made": {"a": {"b": 2.5}},
            "rows": [{"n": 1, "s": None}, {"n": 2, "s": 3.0}],
            "mib": [300, 301.5],
            "none": [],
        }
    )
    assert text.splitlines() == [
        "ratio: 1.05",
        "made: {a: {b: 2.5}}",
        "mib: 300, 302",
        "",
        "rows:",
        "",
        "| n | s |",
        "|--|--|",
        "| 1 | None |",
        "| 2 | 3 |",
    ]
