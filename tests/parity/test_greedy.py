"""30 tokens decoded greedily, with the cache and without, against the ids that the vendor's code decodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.cache.paged import empty_cache
from step3_jax.layers.attention import CacheStep
from step3_jax.layers.embed import merge_image_features

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimised_file")]
STEPS = 30
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["tiny_text", "tiny_fp8", "tiny_fp8 as stored", "tiny_vl"])
def prompt(request, models, arrays, run_jitted):
    """A model, the embedded prompt, and the golden ids and logits of each step."""
    if request.param not in models:
        pytest.skip("no CPU kernels")
    model, golden = models[request.param], arrays[request.param]
    if request.param == "tiny_vl":
        ids = jnp.asarray(golden["input_ids"])[None]
        features = run_jitted(
            lambda model, pixels, windows: model.image_features(pixels, windows, [2, 0, 3]),
            model,
            golden["pixel_values"],
            golden["patch_pixel_values"],
        )
        is_place = ids == model.config.image_token_id
        rows = jnp.where(is_place, jnp.cumsum(is_place, axis=1) - 1, -1)
        embeddings = merge_image_features(model.text.embed_tokens(ids), features, rows)
    else:
        embeddings = model.text.embed_tokens(jnp.asarray(golden["gen_prompt"])[None])
    assert golden["gen_ids"].shape == (STEPS,)
    return model.text, embeddings, golden["gen_ids"], golden["gen_step_logits"]


def check(found_ids, found_logits, ids, logits):
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_allclose(np.stack(found_logits), logits, rtol=0, atol=TOLERANCE)


def test_greedy_with_the_cache(prompt):
    decoder, embeddings, ids, logits = prompt
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def step(state, embeddings, cache, place):
        text = nnx.merge(graphdef, state)
        hidden, cache = text(embeddings, cache=cache, step=place)
        logits = text.logits(hidden[0, -1])
        return logits, text.embed_tokens(jnp.argmax(logits)[None, None]), cache

    length = embeddings.shape[1]
    num_pages = -(-(length + STEPS) // PAGE_SIZE)
    cache = empty_cache(decoder.config, num_pages, "float32")
    # In reverse, as pages need not be in order.
    table = jnp.arange(num_pages)[None, ::-1]
    place = CacheStep(table, jnp.asarray([length]), jnp.asarray([0, length]))
    found_ids, found_logits = [], []
    for _ in range(STEPS):
        row, embeddings, cache = step(state, embeddings, cache, place)
        length += 1
        place = CacheStep(table, jnp.asarray([length]))
        found_ids.append(int(jnp.argmax(row)))
        found_logits.append(row)
    check(found_ids, found_logits, ids, logits)


def test_greedy_without_a_cache(prompt):
    decoder, embeddings, ids, logits = prompt
    graphdef, state = nnx.split(decoder)
    start = embeddings.shape[1]

    @jax.jit
    def step(state, embeddings, last):
        text = nnx.merge(graphdef, state)
        hidden, _ = text(embeddings)
        logits = text.logits(hidden[0, last])
        row = text.embed_tokens(jnp.argmax(logits)[None, None])
        return logits, jax.lax.dynamic_update_slice(embeddings, row, (0, last + 1, 0))

    # Attention is causal: the padding after the last token changes nothing, and one compiled shape serves all steps.
    embeddings = jnp.pad(embeddings, ((0, 0), (0, STEPS), (0, 0)))
    found_ids, found_logits = [], []
    for last in range(start - 1, start - 1 + STEPS):
        row, embeddings = step(state, embeddings, last)
        found_ids.append(int(jnp.argmax(row)))
        found_logits.append(row)
    check(found_ids, found_logits, ids, logits)
