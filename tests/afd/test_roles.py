"""The two roles' steps, joined, are the fused model; micro-batches are the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.afd.microbatch import merge_reports, part_size, split_chunk, split_rows
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.roles import Tokens, arrays_by_role, attention_step, begin_step, end_step, ffn_step, take_apart
from step3_jax.cache.paged import Cache, empty_cache
from step3_jax.config import ModelConfig
from step3_jax.engine.state import PrefillBatch, Report
from step3_jax.layers.attention import CacheStep
from step3_jax.layout.parallel import Parallel
from step3_jax.mesh import make_layout
from step3_jax.model.step3 import Step3
from tests.small import small_text

TEXT = small_text(num_hidden_layers=3)


@pytest.fixture(scope="module")
def model() -> Step3:
    config = ModelConfig(text=TEXT, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)
    make = jax.jit(lambda: nnx.split(Step3(config, rngs=nnx.Rngs(0)))[1])
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(0))))[0], make())


def chunk() -> PrefillBatch:
    """Three sequences of 9, 0 and 12 tokens, the last one with 70 in the cache before, and 3 tokens of padding."""
    rng = np.random.default_rng(0)
    return PrefillBatch(
        jnp.asarray(rng.integers(0, 61, 24), jnp.int32),
        jnp.asarray([0, 9, 9, 21], jnp.int32),
        jnp.asarray([9, 0, 82], jnp.int32),
        jnp.asarray([[3, 0], [0, 0], [1, 2]], jnp.int32),
    )


def filled_cache() -> Cache:
    rng = np.random.default_rng(3)
    pages = empty_cache(TEXT, 4, "float32")
    return pages._replace(
        keys=jnp.asarray(rng.standard_normal(pages.keys.shape), jnp.float32),
        values=jnp.asarray(rng.standard_normal(pages.values.shape), jnp.float32),
    )


def run_roles(
    model: Step3, payload: str, parts: list[PrefillBatch], cache: Cache
) -> tuple[dict[int, np.ndarray], Cache]:
    """All layers for each of some parts, layer by layer, through the payload.

    Returns:
      Logits of tokens 8 and 20 if there is one part, and the cache.
    """
    form, layout = PayloadFormat.of(TEXT, payload), make_layout(Parallel(ep=1), jax.devices()[:1])
    taken = take_apart(model)

    @jax.jit
    def run(parts: list[PrefillBatch], cache: Cache) -> tuple[dict[int, jax.Array], Cache]:
        pages = cache
        ends = taken.ends.skeleton.build(taken.ends.leaves)
        steps = [CacheStep(part.table, part.lengths, part.query_starts) for part in parts]
        flows = [
            begin_step(ends, TEXT, form, part.token_ids[None], step, 64)
            for part, step in zip(parts, steps, strict=True)
        ]
        for layer, (attention, ffn) in enumerate(zip(taken.attention, taken.ffn, strict=True)):
            for index, tokens in enumerate(flows):
                block = attention.skeleton.build(attention.leaves)
                hidden, rows, pages = attention_step(block, form, tokens, pages, layer, 4)
                assert rows.shape[1] == form.row_bytes
                returned = ffn_step(ffn.skeleton.build(ffn.leaves), layout, 4, form, rows, jnp.float32)
                flows[index] = Tokens(hidden, returned, tokens.context)
        logits = {}
        if len(parts) == 1:
            every = end_step(ends, form, flows[0])[0]
            logits = {last: every[last] for last in (8, 20)}
        return logits, pages

    logits, pages = run(parts, cache)
    return {last: np.asarray(values) for last, values in logits.items()}, pages


def run_fused(model: Step3, batch: PrefillBatch, cache: Cache) -> tuple[np.ndarray, Cache]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(batch: PrefillBatch, cache: Cache) -> tuple[jax.Array, Cache | None]:
        decoder = nnx.merge(graphdef, state).text
        step = CacheStep(batch.table, batch.lengths, batch.query_starts)
        hidden, filled = decoder(decoder.embed_tokens(batch.token_ids[None]), cache=cache, step=step)
        return decoder.logits(hidden[0]), filled

    logits, filled = run(batch, cache)
    assert filled is not None
    return np.asarray(logits), filled


def test_layers_of_one_form_share_one_skeleton(model: Step3) -> None:
    taken = take_apart(model)
    for parts in (taken.attention, taken.ffn):
        kinds = [id(part.skeleton) for part in parts]
        assert kinds[0] == kinds[2] != kinds[1]


def test_every_array_has_one_role(model: Step3) -> None:
    found = arrays_by_role(model)
    count = sum(array.size for arrays in found.values() for array in arrays)
    assert count == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    # Experts, shared experts and dense layers.
    moe = 3 * 32 * 16 * (4 + 1)
    assert sum(array.size for array in found["ffn"]) == moe + 2 * 3 * 32 * 48


def test_the_roles_joined_are_the_fused_model(model: Step3) -> None:
    expected, expected_cache = run_fused(model, chunk(), filled_cache())
    for payload, tolerance in (("float32", 1e-5), ("bfloat16", 0.02), ("fp8", 0.2)):
        logits, cache = run_roles(model, payload, [chunk()], filled_cache())
        for last, found in logits.items():
            assert np.mean(np.abs(found - expected[last])) < tolerance, payload
        if payload == "float32":
            np.testing.assert_allclose(cache.keys, expected_cache.keys, atol=1e-5)


def test_a_chunk_in_parts_fills_the_cache_as_the_whole_does(model: Step3) -> None:
    _, expected = run_fused(model, chunk(), filled_cache())
    parts = split_chunk(chunk(), 3)
    assert len(parts) == 3
    _, cache = run_roles(model, "float32", parts, filled_cache())
    np.testing.assert_allclose(cache.keys, expected.keys, atol=1e-5)
    np.testing.assert_allclose(cache.values, expected.values, atol=1e-5)


def test_a_part_says_which_tokens_it_has() -> None:
    first, second = split_chunk(chunk(), 2)
    assert first.query_starts.tolist() == [0, 9, 9, 12]
    assert first.lengths.tolist() == [9, 0, 73]
    assert second.query_starts.tolist() == [0, 0, 0, 9]
    assert second.lengths.tolist() == [0, 0, 82]
    features = chunk()._replace(features=jnp.ones((2, 32)), feature_rows=jnp.arange(24, dtype=jnp.int32))
    parts = split_chunk(features, 5)
    rows = np.concatenate([part.feature_rows for part in parts])
    assert rows.tolist() == [*range(24), -1]


@pytest.mark.parametrize(
    ("size", "parts", "expected"), [(8, 3, (3, 3)), (4, 3, (2, 2)), (1, 4, (1, 1)), (2, 3, (1, 2))]
)
def test_parts_are_equal_and_none_is_empty(size: int, parts: int, expected: tuple[int, int]) -> None:
    assert part_size(size, parts) == expected


def test_rows_come_back_in_their_order() -> None:
    rows = jnp.arange(8, dtype=jnp.int32)
    reports = [Report(part[:, None], part, part, None) for part in split_rows(rows, 8, 3)]
    assert [report.num_new.tolist() for report in reports] == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    merged = merge_reports(reports, 8)
    assert merged.num_new.tolist() == list(range(8))
    assert merged.tokens.shape == (8, 1)
