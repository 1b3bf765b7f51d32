"""Decode attention: the reference against float64, the kernel against the reference, edges packed in ragged batches.

Whatever a sequence must not read is poisoned: rows past its end, pages that no sequence owns, table entries past its end.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.mfa_decode import mosaic, plan, reference
from pallas_kernels.mfa_decode.api import mfa_decode, mfa_decode_quantised, plan_decode
from pallas_kernels.mfa_decode.queries import terms
from pallas_kernels.pages import CachedTokens, KVPages, contiguous_pages, decode_rows, empty_pages, encode_rows
from pallas_kernels.storage import Storage
from step3_jax.sampling.speculation import MAX_SPECULATIVE_TOKENS
from tests.kernels.support import lower_for_cuda, row_errors

SCALE = 0.05
# Against the reference on the same stored numbers: what 16-bit weights and values lose. Keys are multiplied in stored form.
TOLERANCE = {"bfloat16": 3e-3, "fp8": 2e-3, "int4": 4e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """A ragged batch."""

    storage: Storage
    lengths: tuple[int, ...]
    tokens: int = 1
    heads: int = 64
    page_size: int = 64
    head_dim: int = 256

    def make(self) -> tuple[jax.Array, CachedTokens]:
        """Queries, and the cache with poisoned pages; the queries are float32, so that outputs are not rounded."""
        rng = np.random.default_rng(len(self.lengths) + 7 * self.tokens + self.heads)
        batch, size = len(self.lengths), self.page_size
        max_pages = max(1, -(-max(self.lengths) // size)) + 1
        num_pages = batch * max_pages + 1
        shape = (num_pages, size, self.head_dim)
        table = rng.permutation(num_pages - 1).reshape(batch, max_pages) + 1
        poison = np.ones(shape[:2], bool)
        for row, length in zip(table, self.lengths, strict=True):
            positions = np.arange(length)
            poison[row[positions // size], positions % size] = False
            row[-(-length // size) :] = rng.choice([0, num_pages + 1000])
        rows = [jnp.asarray(rng.normal(size=shape) * 10.0 ** rng.uniform(-1, 1, (*shape[:2], 1))) for _ in range(2)]
        stored = [_poisoned(*encode_rows(array, self.storage), jnp.asarray(poison)) for array in rows]
        pages = KVPages(stored[0][0], stored[1][0], stored[0][1], stored[1][1])
        queries = jnp.asarray(rng.normal(size=(batch, self.tokens, self.heads, self.head_dim)), jnp.bfloat16)
        cached = CachedTokens(pages, jnp.asarray(table, jnp.int32), jnp.asarray(self.lengths, jnp.int32))
        return queries.astype(jnp.float32), cached


def _poisoned(stored: jax.Array, scales: jax.Array | None, where: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    worst = 0xFF if stored.dtype == jnp.uint8 else jnp.nan
    stored = jnp.where(where[..., None], jnp.asarray(worst, stored.dtype), stored)
    if scales is None:
        return stored, None
    return stored, jnp.swapaxes(jnp.where(where[..., None], jnp.nan, scales), 1, 2).astype(scales.dtype)


def _attend_float64(queries: jax.Array, cached: CachedTokens) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, one token after the other."""
    pages, table, lengths, _ = cached
    batch, tokens, _, head_dim = queries.shape
    out, lse = np.zeros(queries.shape), np.full(queries.shape[:3], -np.inf)
    for b in range(batch):
        length = int(lengths[b])
        if length == 0:
            continue
        used = np.asarray(table)[b, : -(-length // pages.page_size)]
        rows = []
        for stored, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales)):
            picked = None if scales is None else jnp.swapaxes(scales[used], 1, 2)
            rows.append(np.asarray(decode_rows(stored[used], picked, jnp.float32), np.float64).reshape(-1, head_dim))
        for t in range(tokens):
            end = length - tokens + t + 1
            if end <= 0:
                continue
            scores = np.asarray(queries[b, t], np.float64) @ rows[0][:end].T * SCALE
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, t] = weights @ rows[1][:end] / weights.sum(axis=1, keepdims=True)
            lse[b, t] = np.log(weights.sum(axis=1)) + scores.max(axis=1)
    return out, lse


def _after_one_page(cached: CachedTokens) -> CachedTokens:
    """The same, as if the sequences' pages were those of a layer that starts after the first page of the pool."""
    return cached._replace(table=cached.table - 1, first_page=jnp.int32(1))


def _errors_by_token(actual: jax.Array, expected: np.ndarray | jax.Array) -> np.ndarray:
    batch, tokens = actual.shape[:2]
    flat = (batch * tokens, -1)
    return row_errors(np.asarray(actual).reshape(flat), np.asarray(expected).reshape(flat))


REFERENCE_CASES = [
    Case("float32", (0, 1, 7, 8, 9, 41), page_size=8, heads=8, head_dim=64),
    Case("bfloat16", (0, 2, 3, 8, 41), tokens=4, page_size=8, heads=3, head_dim=64),
    Case("fp8", (5, 0, 64, 65), tokens=2, heads=8),
    Case("int4", (5, 0, 64, 65), heads=16),
    # More than one chunk, the last of it partly past the table.
    Case("float32", (2048, 2049, 5000, 1), heads=4, head_dim=64),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=lambda case: f"{case.storage}-{max(case.lengths)}")
def test_the_reference_equals_float64_attention(case: Case) -> None:
    queries, cached = case.make()
    run = functools.partial(mfa_decode, scale=SCALE, return_lse=True, implementation="reference")
    out, lse = jax.jit(run)(queries, _after_one_page(cached))
    expected, expected_lse = _attend_float64(queries, cached)
    assert np.max(_errors_by_token(out, expected)) < 2e-5
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-5, atol=1e-4)


EDGES = (0, 1, 63, 64, 65, 200)
MOST_TOKENS = 1 + MAX_SPECULATIVE_TOKENS
# T * H <= 64 rows use the kernel's first form, more use its second.
SHORT_CASES = [(Case("bfloat16", EDGES), True), (Case("fp8", (*EDGES, 2), tokens=8, heads=16), False)]
THOROUGH_CASES = [
    (Case("int4", (*EDGES, 2), tokens=4, heads=16, page_size=128), False),
    # A token and the most guesses that a step may have.
    (Case("fp8", (0, 5, 17, 70), tokens=MOST_TOKENS, heads=4), False),
]
LONG_CASES = [
    (Case(storage, (*EDGES, 3, 127, 128, 129, 400), tokens, heads, page_size), True)
    for storage in ("bfloat16", "fp8", "int4")
    for tokens, heads, page_size in (
        (1, 64, 64),
        (8, 8, 64),
        (1, 16, 128),
        (2, 64, 64),
        (4, 64, 192),
        (8, 32, 64),
        (MOST_TOKENS, 16, 64),
    )
]


def _name(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.storage}-T{value.tokens}-H{value.heads}-page{value.page_size}"
    return "races" if value else ""


def _check_kernel(case: Case, detect_races: bool) -> None:
    queries, cached = case.make()
    assert mosaic.unsupported(queries, cached.pages) is None
    run = functools.partial(mosaic.decode_attention, scale=SCALE, interpret=True, detect_races=detect_races)
    with race_check():
        out, lse = jax.block_until_ready(jax.jit(run)(queries, _after_one_page(cached)))
    expected, expected_lse = jax.jit(functools.partial(reference.decode_attention, scale=SCALE))(queries, cached)
    assert out.dtype == queries.dtype
    assert np.max(_errors_by_token(out, expected)) < TOLERANCE[case.storage]
    np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), atol=1e-3)
    is_blind = np.asarray(case.lengths)[:, None] - case.tokens + np.arange(case.tokens) < 0
    assert np.all(np.asarray(out)[is_blind] == 0)
    assert np.all(np.asarray(lse)[is_blind] == -np.inf)


@pytest.mark.parametrize(("case", "detect_races"), SHORT_CASES, ids=_name)
def test_the_kernel_equals_the_reference_and_reads_no_poison(case: Case, detect_races: bool) -> None:
    _check_kernel(case, detect_races)


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "detect_races"), THOROUGH_CASES, ids=_name)
def test_the_kernel_equals_the_reference_in_other_forms(case: Case, detect_races: bool) -> None:
    _check_kernel(case, detect_races)


@pytest.mark.kernels
@pytest.mark.parametrize(("case", "detect_races"), LONG_CASES, ids=_name)
def test_the_kernel_equals_the_reference_in_every_form(case: Case, detect_races: bool) -> None:
    _check_kernel(case, detect_races)


def test_two_terms_hold_queries_in_bfloat16() -> None:
    scaled = jax.random.normal(jax.random.key(0), (4096,), jnp.bfloat16).astype(jnp.float32)
    scaled = jnp.clip(scaled * 2.0 ** jax.random.randint(jax.random.key(1), scaled.shape, -12, 8), -255, 255)
    scaled = scaled.astype(jnp.bfloat16).astype(jnp.float32)
    error = jnp.abs(scaled - sum(term.astype(jnp.float32) for term in terms(scaled)))
    assert jnp.max(jnp.where(jnp.abs(scaled) >= 0.25, error, 0)) == 0
    assert 0 < jnp.max(error) <= 2**-10


@pytest.mark.kernels
def test_the_kernel_gives_the_same_bits_twice() -> None:
    args = Case("fp8", (300, 10, 64), heads=8).make()
    run = jax.jit(functools.partial(mosaic.decode_attention, scale=SCALE, interpret=True))
    first, second = (np.asarray(run(*args)[0]).view(np.uint16) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.kernels
def test_tiny_values_keep_their_precision_in_fp8() -> None:
    # Weights times the plain scales would vanish in float16.
    queries, cached = Case("fp8", (100, 64), heads=8).make()
    pages = cached.pages
    tiny = cached._replace(pages=pages._replace(value_scales=pages.value_scales * 1e-20))
    run = functools.partial(mosaic.decode_attention, scale=SCALE, interpret=True)
    out, _ = run(queries, tiny)
    expected, _ = reference.decode_attention(queries, tiny, scale=SCALE)
    assert np.max(_errors_by_token(out, expected)) < TOLERANCE["fp8"]


@pytest.mark.thorough
def test_the_public_function_runs_the_interpreted_kernel_on_a_contiguous_cache() -> None:
    queries, keys, values = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate([(2, 1, 8, 256), (2, 128, 256), (2, 128, 256)])
    )
    pages, table = contiguous_pages(keys, values)
    lengths = jnp.array([128, 70])
    work = plan_decode(lengths, tokens=1, heads=8, storage="bfloat16", max_tokens=128, workers=1)
    args = (queries, CachedTokens(pages, table, lengths))
    out = jax.jit(functools.partial(mfa_decode, implementation="interpret"))(*args, plan=work)
    expected = jax.jit(mfa_decode)(*args, plan=work)
    assert out.dtype == jnp.bfloat16
    assert np.max(_errors_by_token(out, expected)) < 5e-3


def _check_quantised(case: Case) -> None:
    queries, cached = case.make()
    assert mosaic.unsupported_quantised(queries) is None
    run = functools.partial(mosaic.decode_quantised, scale=SCALE, interpret=True, detect_races=True)
    num_rows = queries.shape[0] * queries.shape[1]
    with race_check():
        values, scales = jax.block_until_ready(jax.jit(run)(queries, cached))
    expected = reference.decode_quantised(queries, cached, scale=SCALE)
    assert values.shape == expected[0].shape
    assert scales.shape == expected[1].shape
    # Heads that see nothing are zeros, and their scale is 1.
    np.testing.assert_allclose(scales[:, :num_rows], expected[1][:, :num_rows], rtol=2e-2)
    got, want = (
        np.asarray(pair[0]).astype(np.float64)
        * np.repeat(np.asarray(pair[1])[:, :num_rows].T.astype(np.float64), 128, axis=1)
        for pair in ((values, scales), expected)
    )
    # A number halfway between two of e4m3 may go either way.
    assert row_errors(got, want).max() < 0.02


def test_heads_come_out_quantised_as_the_reference_has_them() -> None:
    _check_quantised(Case("bfloat16", (0, 70, 64)))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case", [Case("fp8", (*EDGES, 2)), Case("fp8", (5, 70, 1), tokens=3), Case("fp8", (70, 9), tokens=5)], ids=_name
)
def test_heads_come_out_quantised_in_every_form(case: Case) -> None:
    _check_quantised(case)


def test_heads_that_make_no_whole_tile_are_quantised_by_the_reference() -> None:
    queries, cached = Case("bfloat16", (70, 5), heads=16).make()
    values, scales = mfa_decode_quantised(queries, cached)
    assert values.shape == (2, 16 * 256)
    assert scales.shape == (32, 4)
    with pytest.raises(NotImplementedError, match="quantises a multiple of 64 heads, not 16"):
        mfa_decode_quantised(queries, cached, implementation="interpret")


MISSING_WAIT = """
import functools, sys, types
import jax
from pallas_kernels.compat import race_check
from pallas_kernels.mfa_decode import mosaic, worker
from tests.kernels.test_mfa_decode import Case

class WithoutWait(types.SimpleNamespace):
    def __getattr__(self, name):
        return getattr(real, name)

def barrier_wait(barrier):
    # The wait for a free slot, in the function of that name.
    if sys._getframe(1).f_code.co_name != "wait_for_slot":
        real.barrier_wait(barrier)

real = worker.plgpu
if sys.argv[1] == "broken":
    worker.plgpu = WithoutWait(barrier_wait=barrier_wait)
run = functools.partial(
    mosaic.decode_attention, scale=1.0, interpret=True, detect_races=True, blocks={"workers": 1, "slots": 2}
)
with race_check():
    jax.block_until_ready(jax.jit(run)(*Case("bfloat16", (256,), heads=8).make()))
print("no race")
"""


def _run_planted(argument: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-c", MISSING_WAIT, argument], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired as hang:
        # The interpreter of JAX 0.10 reports what it found, and then waits for threads that have ended.
        return "hung: " + b"".join([hang.stdout or b"", hang.stderr or b""]).decode()
    return "passed" if done.returncode == 0 and "no race" in done.stdout else done.stderr


@pytest.mark.kernels
def test_a_missing_wait_for_a_free_slot_is_caught() -> None:
    assert _run_planted("whole") == "passed"
    outcome = _run_planted("broken")
    assert outcome != "passed"
    assert "RACE DETECTED" in outcome or "ValueError: Barrier" in outcome, outcome[-2000:]


@pytest.mark.parametrize(
    ("storage", "batch", "tokens", "heads", "length"),
    [
        ("bfloat16", 64, 1, 64, 8192),
        ("fp8", 128, 1, 64, 4096),
        ("int4", 64, 1, 64, 8192),
        ("bfloat16", 8, 4, 64, 65_536),
        ("fp8", 1, 8, 64, 65_536),
        ("int4", 16, 8, 16, 32_768),
        ("fp8", 64, 1, 8, 8192),
        ("fp8", 64, 5, 64, 8192),
        ("bfloat16", 64, MOST_TOKENS, 64, 8192),
        ("fp8", 8, MOST_TOKENS, 64, 8192),
        ("int4", 64, MOST_TOKENS, 8, 8192),
    ],
)
def test_the_kernel_lowers_for_cuda_at_the_real_models_shapes(
    storage: Storage, batch: int, tokens: int, heads: int, length: int
) -> None:
    pages = jax.eval_shape(lambda: empty_pages(batch * length // 64, 256, storage))
    shape = jax.ShapeDtypeStruct
    args = (
        shape((batch, tokens, heads, 256), jnp.bfloat16),
        CachedTokens(pages, shape((batch, length // 64), jnp.int32), shape((batch,), jnp.int32)),
    )
    assert "mosaic_gpu" in lower_for_cuda(mfa_decode, *args)
    if (storage, heads) == ("fp8", 64):
        # With the queries and heads of a model in FP8.
        run = functools.partial(mfa_decode_quantised, implementation="mosaic")
        text = lower_for_cuda(run, args[0].update(dtype=jnp.float16), *args[1:])
        assert "mfa_combine_quantised" in text


@pytest.mark.parametrize(
    "lengths",
    [
        (0,),
        (1,),
        (64 * 9, 0, 0, 1, 65, 0),
        (128,) * 64,
        (4096,) * 85,
        (8192,) * 64,
        (65_536, *(1,) * 63),
        tuple(range(0, 8192, 100)),
    ],
)
@pytest.mark.parametrize(("workers", "min_blocks"), [(132, 4), (3, 1), (1, 1)])
def test_a_plan_gives_every_block_to_one_worker_and_every_fragment_a_number(
    lengths: tuple[int, ...], workers: int, min_blocks: int
) -> None:
    work = plan.plan_work(jnp.asarray(lengths), capacity=65_536, workers=workers, min_blocks=min_blocks)
    starts, spans, fragments = (np.asarray(array) for array in (work.starts, work.spans, work.fragments))
    owned: dict[int, list[int]] = {}
    numbers: list[int] = []
    for worker, (begin, end, first, count) in enumerate(spans):
        for b in range(first, first + count):
            low, high = max(begin, starts[b]), min(end, starts[b + 1])
            if high > low:
                owned.setdefault(b, []).extend(range(low - starts[b], high - starts[b]))
                numbers.append(b + worker)
                assert fragments[b, 0] <= b + worker < fragments[b, 0] + fragments[b, 1]
    for b, length in enumerate(lengths):
        assert owned.get(b, []) == list(range(-(-length // 64)))
        assert (fragments[b, 1] == 0) == (length == 0)
    assert len(set(numbers)) == len(numbers) == fragments[:, 1].sum()
    assert max(numbers, default=0) < plan.num_fragments(len(lengths), workers)


def test_equal_sequences_are_cut_at_their_ends_where_that_costs_little() -> None:
    work = plan.plan_work(jnp.full((64,), 8192), capacity=8192, workers=132, min_blocks=4)
    assert np.asarray(work.fragments)[:, 1].tolist() == [2] * 64
    work = plan.plan_work(jnp.full((128,), 4096), capacity=8192, workers=132, min_blocks=4)
    assert np.asarray(work.fragments)[:, 1].tolist() == [1] * 128


def test_a_length_beyond_the_table_is_cut_off() -> None:
    queries, cached = Case("bfloat16", (128, 64), heads=8).make()
    short = cached._replace(table=cached.table[:, :2])
    longer = short._replace(lengths=jnp.array([10_000, 64]))
    assert np.array_equal(mfa_decode(queries, short, scale=SCALE)[0], mfa_decode(queries, longer, scale=SCALE)[0])


def test_an_empty_batch_or_table_gives_zeros() -> None:
    pages = empty_pages(1, 64, "float32")
    queries = jnp.ones((2, 1, 4, 64))
    empty = CachedTokens(pages, jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32))
    out, lse = mfa_decode(queries, empty, return_lse=True)
    assert np.all(np.asarray(out) == 0)
    assert np.all(np.asarray(lse) == -np.inf)
    nothing = CachedTokens(pages, jnp.zeros((0, 1), jnp.int32), jnp.zeros(0, jnp.int32))
    assert mfa_decode(queries[:0], nothing).shape == (0, 1, 4, 64)


def test_shapes_that_do_not_fit_are_refused() -> None:
    lengths = jnp.ones(2, jnp.int32)
    cached = CachedTokens(empty_pages(4, 64, "float32"), jnp.zeros((2, 1), jnp.int32), lengths)
    with pytest.raises(ValueError, match="heads of 32, the pages rows of 64"):
        mfa_decode(jnp.ones((2, 1, 4, 32)), cached)
    other = plan_decode(jnp.ones(3, jnp.int32), tokens=1, heads=4, storage="fp8", max_tokens=64)
    with pytest.raises(ValueError, match="the plan is for 3 sequences, the queries are of 2"):
        mfa_decode(jnp.ones((2, 1, 4, 64)), cached, plan=other)
    with pytest.raises(ValueError, match="not for float32"):
        plan_decode(lengths, tokens=1, heads=4, storage="float32", max_tokens=64)
    with pytest.raises(NotImplementedError, match="not float32; use implementation='auto' or 'reference'"):
        mfa_decode(jnp.ones((2, 1, 4, 64)), cached, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="heads of 256, not 64"):
        mfa_decode(
            jnp.ones((2, 1, 4, 64)), cached._replace(pages=empty_pages(4, 64, "fp8")), implementation="interpret"
        )
    odd = cached._replace(pages=empty_pages(4, 256, "bfloat16", page_size=96))
    with pytest.raises(NotImplementedError, match="pages of 96"):
        mfa_decode(jnp.ones((2, 1, 4, 256)), odd, implementation="mosaic")
