"""The jitted calls: how often they are traced, and that the cache stays where it is."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.cache.paged import Cache
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import FULL, IDLE, RUNNING, STOPPED, DecodeBatch, DecodeCall, PrefillBatch, Report
from step3_jax.layers.attention import CacheStep
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

VOCAB_SIZE = 264
NUM_PAGES, MAX_PAGES, MAX_STEPS = 37, 8, 16
PROMPT_LENGTH = 5


def chunk(num_rows: int, padding: int = 0) -> PrefillBatch:
    """The first four of five tokens of each row, which has two pages."""
    count = PROMPT_LENGTH - 1
    ids = np.full((32,), padding, np.int32)
    ids[: num_rows * count] = prompts(num_rows)[:, :-1].reshape(-1)
    starts = np.arange(num_rows + 1, dtype=np.int32) * count
    return PrefillBatch(
        jnp.asarray(ids), jnp.asarray(starts), jnp.full((num_rows,), count, jnp.int32), jnp.asarray(table(num_rows))
    )


def prompts(num_rows: int) -> np.ndarray:
    return (np.arange(num_rows * PROMPT_LENGTH, dtype=np.int32) * 7 % VOCAB_SIZE).reshape(num_rows, -1)


def table(num_rows: int) -> np.ndarray:
    return np.arange(num_rows * MAX_PAGES, dtype=np.int32).reshape(num_rows, -1)[:, ::-1] + 3


def decode_batch(num_rows: int, *, is_active: list[bool] | None = None) -> DecodeBatch:
    return DecodeBatch(
        last=jnp.asarray(prompts(num_rows)[:, -1]),
        cached=jnp.full((num_rows,), PROMPT_LENGTH - 1, jnp.int32),
        num_generated=jnp.zeros((num_rows,), jnp.int32),
        is_active=jnp.asarray(is_active or [True] * num_rows),
        table=jnp.asarray(table(num_rows)),
    )


def sampling_of(max_tokens: list[int], stop_ids: tuple[int, ...] = ()) -> SamplingBatch:
    rows = [SamplingRow(SamplingParams(temperature=0), count, (0, 0), stop_ids) for count in max_tokens]
    return sampling_batch(rows, VOCAB_SIZE, len(rows))


def run(
    runner: Runner,
    cache: Cache,
    batch: DecodeBatch,
    sampling: SamplingBatch,
    num_steps: int = MAX_STEPS,
    *,
    leave_early: bool = False,
) -> tuple[Cache, Report]:
    call = DecodeCall(batch, sampling, num_steps, max_steps=MAX_STEPS, leave_early=leave_early)
    cache, started = runner.decode(cache, call)
    return cache, started.result()


def read(runner: Runner, num_rows: int, padding: int = 0) -> Cache:
    return runner.prefill(runner.allocate_cache(NUM_PAGES, "float32"), chunk(num_rows, padding))[0]


def keys_by_layer(runner: Runner, cache: Cache) -> np.ndarray:
    """A copy of the pool's keys, [L, P, page, K]."""
    return np.array(cache.keys).reshape(runner.config.text.num_hidden_layers, NUM_PAGES, *cache.keys.shape[1:])


def test_nothing_is_traced_twice_for_a_bucket(model: Step3) -> None:
    runner = Runner(model)
    llm = LLM.from_model(runner, stream_interval=3)

    def params(seed: int, **values: float) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=10, ignore_eos=True, **values)

    llm.generate([[1], [2, 3]], params(1, temperature=0.5, top_k=9))
    assert runner.num_traces == {"prefill": 1, "decode": 1}
    compile_s = runner.compile_s
    assert compile_s > 0
    assert llm.stats.compile_s == pytest.approx(compile_s)
    # Other lengths, parameters, numbers of steps; streamed or not: all in the same buckets.
    llm.generate([[1, 2, 3], list(range(20))], [params(2, top_k=40), params(3, top_k=8, top_p=0.3)])
    list(llm.generate([[4], [5]], params(4, temperature=2.0, top_k=100), stream=True))
    assert runner.num_traces == {"prefill": 1, "decode": 1}
    assert runner.compile_s == compile_s
    llm.generate([[4], list(range(35))], params(5, top_k=1))
    assert runner.num_traces == {"prefill": 2, "decode": 1}


def test_a_chunk_counts_its_tokens_of_each_expert_and_no_padding(model: Step3, runner: Runner) -> None:
    _, started = runner.prefill(runner.allocate_cache(NUM_PAGES, "float32"), chunk(3, padding=5))
    (counts,) = started.result()
    config = model.config.text
    hidden = model.text.embed_tokens(jnp.asarray(prompts(3)[:, :-1]))
    _, _, chosen = model.text.run(hidden, observe=lambda routing: routing.experts)
    expected = [np.bincount(np.ravel(one), minlength=config.moe_num_experts) for one in chosen]
    # The last layer's experts have nothing to do for a cache.
    num_counted = len([layer for layer in config.moe_layers if layer < config.num_hidden_layers - 1])
    assert counts.tolist() == np.asarray(expected)[:num_counted].tolist()
    assert counts.sum(axis=1).tolist() == [3 * (PROMPT_LENGTH - 1) * config.moe_top_k] * num_counted


def test_the_cache_is_given_away_and_the_report_stays(runner: Runner) -> None:
    before = read(runner, 1)
    after, first = run(runner, before, decode_batch(1), sampling_of([9]), 4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    batch = decode_batch(1)._replace(
        last=first.tokens[:, 3], cached=jnp.asarray([PROMPT_LENGTH + 3]), num_generated=first.num_new
    )
    _, second = run(runner, after, batch, sampling_of([9]))
    assert (first.num_new.tolist(), first.finish.tolist()) == ([4], [RUNNING])
    assert (second.num_new.tolist(), second.finish.tolist()) == ([5], [FULL])
    _, whole = run(runner, read(runner, 1), decode_batch(1), sampling_of([9]))
    assert whole.tokens[0, :9].tolist() == [*first.tokens[0, :4].tolist(), *second.tokens[0, :5].tolist()]


@pytest.mark.parametrize(("num_rows", "storage"), [(1, "float32"), (4, "float32"), (1, "fp8"), (4, "fp8")])
@pytest.mark.usefixtures("optimised")
def test_no_copy_of_the_cache_is_in_the_compiled_calls(runner: Runner, num_rows: int, storage: str) -> None:
    cache = jax.eval_shape(lambda: runner.allocate_cache(NUM_PAGES, storage))
    num_layers = runner.config.text.num_hidden_layers
    decode = runner.decode_program(cache, decode_batch(num_rows), sampling_of([9] * num_rows), max_steps=MAX_STEPS)
    programs = [decode]
    if num_rows == 4:
        programs.append(runner.prefill_program(cache, chunk(num_rows)))
    assert "while(" in decode.as_text()
    for program in programs:
        # Whatever has as many rows as the cache has pages: the only things done to it are writes in place, each of
        # them wrapped in a fusion of its own at most.
        made = re.findall(rf"= (\w+)\[{cache.num_pages},\S+ ([\w-]+)\(", program.as_text())
        assert ("f32" if storage == "float32" else "s16" if storage == "bfloat16" else "s8") in {
            kind for kind, _ in made
        }
        done = [name for _, name in made if name not in ("parameter", "get-tuple-element")]
        writes = [name for name in done if name in ("scatter", "dynamic-update-slice")]
        assert set(done) <= {"scatter", "dynamic-update-slice", "fusion"}, done
        buffers = 2 * num_layers * (2 if storage == "fp8" else 1)
        assert len(writes) == buffers
        assert done.count("fusion") <= buffers


def test_rows_end_by_themselves_and_idle_ones_write_nothing(runner: Runner) -> None:
    cache = read(runner, 4)
    pages = table(4)
    before = keys_by_layer(runner, cache)
    is_active = [True, True, False, True]
    cache, report = run(runner, cache, decode_batch(4, is_active=is_active), sampling_of([2, 9, 9, 1]))
    assert report.finish.tolist() == [FULL, FULL, IDLE, FULL]
    assert report.num_new.tolist() == [2, 9, 0, 1]
    assert not report.tokens[2].any()
    for old, new in zip(before, keys_by_layer(runner, cache), strict=True):
        changed = np.argwhere((old != new).any(-1))
        # A row's last token is never written.
        want = [(pages[row, 0], 4 + step) for row, count in ((0, 2), (1, 9), (3, 1)) for step in range(count)]
        assert sorted(map(tuple, changed.tolist())) == sorted(want)


def test_an_end_token_ends_a_row_and_the_call_if_others_wait(runner: Runner) -> None:
    _, report = run(runner, read(runner, 4), decode_batch(4), sampling_of([9] * 4))
    end = int(report.tokens[1, 2])
    first_end = [row.index(end) + 1 if end in row else 9 for row in report.tokens[:, :9].tolist()]
    _, stopped = run(runner, read(runner, 4), decode_batch(4), sampling_of([9] * 4, (end,)))
    assert stopped.num_new.tolist() == first_end
    assert stopped.finish[1] == STOPPED
    _, left = run(runner, read(runner, 4), decode_batch(4), sampling_of([9] * 4, (end,)), leave_early=True)
    assert left.num_new.tolist() == [min(first_end)] * 4
    assert RUNNING in left.finish.tolist()


def test_padding_behind_a_chunk_changes_nothing(runner: Runner) -> None:
    reports = [run(runner, read(runner, 1, padding), decode_batch(1), sampling_of([9]))[1] for padding in (0, 200)]
    np.testing.assert_array_equal(reports[0].tokens, reports[1].tokens)


@pytest.mark.parametrize("is_chunk", [True, False])
def test_the_cpu_kernels_compute_no_padding_and_no_idle_rows_at_the_end(runner: Runner, is_chunk: bool) -> None:
    if not isinstance(kernels := find_kernels(), Kernels):
        pytest.skip(f"no CPU kernels: {kernels.reason}")
    decode = DecodeCall(decode_batch(4), sampling_of([9] * 4), MAX_STEPS, max_steps=MAX_STEPS)
    text = runner.lower(runner.allocate_cache(NUM_PAGES, "float32"), chunk(1) if is_chunk else decode).as_text()
    constants = set(re.findall(r"(%\w+) = stablehlo\.constant", text))
    calls = re.findall(r"@step3_(products|swiglu|experts)_\w+\(%\w+, (%\w+)", text)
    # No more than keys and values of the chunk's last layer are needed, and only that one has experts.
    assert {operation for operation, _ in calls} == {"products", "swiglu"} | ({"experts"} if not is_chunk else set())
    assert not {num_rows for _, num_rows in calls} & constants


@pytest.mark.parametrize(
    ("lengths", "filled"), [([3, 0, 5, 0], 3), ([0, 0, 0, 0], 0), ([0, 0, 0, 1], 4), ([2, 2, 2, 2], 4)]
)
def test_rows_after_the_last_running_one_are_idle(lengths: list[int], filled: int) -> None:
    step = CacheStep(jnp.zeros((4, 1), jnp.int32), jnp.asarray(lengths, jnp.int32))
    assert [int(step.count_filled(width)) for width in (1, 3)] == [filled, 3 * filled]
    assert int(step._replace(query_starts=jnp.asarray([0, 2, 7])).count_filled(32)) == 7


def test_copied_pages_are_the_same_in_all_layers_and_no_other_page_changes(runner: Runner) -> None:
    cache = read(runner, 4)
    before = keys_by_layer(runner, cache)
    copied = runner.copy_pages(cache, [10, 18, 26], [20, 21, 36])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    for old, new in zip(before, keys_by_layer(runner, copied), strict=True):
        want = old.copy()
        want[[20, 21, 36]] = old[[10, 18, 26]]
        np.testing.assert_array_equal(new, want)
    assert before[0][10].any()


def test_a_row_pauses_behind_its_mark_and_others_go_on(runner: Runner) -> None:
    free = run(runner, read(runner, 2), decode_batch(2), sampling_of([9, 9]))[1]
    first = free.tokens[0].tolist()
    mark = first[3]
    count = first.index(mark) + 1
    rows = [SamplingRow(SamplingParams(temperature=0), 9, (0, 0), (), pause_id) for pause_id in (mark, -1)]
    sampling = sampling_batch(rows, VOCAB_SIZE, 2)
    _, report = run(runner, read(runner, 2), decode_batch(2), sampling)
    assert (report.num_new.tolist(), report.finish.tolist()) == ([count, 9], [STOPPED, FULL])
    assert report.tokens[0, :count].tolist() == first[:count]
    assert report.tokens[1, :9].tolist() == free.tokens[1, :9].tolist()
    _, report = run(runner, read(runner, 2), decode_batch(2), sampling, leave_early=True)
    assert report.num_new.tolist() == [count, count]
    # The last token that is allowed ends the row, mark or not.
    rows[0] = rows[0]._replace(max_tokens=count)
    _, report = run(runner, read(runner, 2), decode_batch(2), sampling_batch(rows, VOCAB_SIZE, 2))
    assert report.finish.tolist() == [FULL, FULL]
