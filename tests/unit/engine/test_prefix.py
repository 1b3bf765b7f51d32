"""Tokens are the same with and without the prefix cache's content."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from step3_jax.cache.prefix import extend_keys, image_marks, root_key
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
# Two starts of more than two pages, with tails of their own.
START, OTHER = list(range(30, 180)), list(range(179, 29, -1))
PROMPTS = [START + [1, 2, 3], OTHER + [4], START + [5], START[:128], START + [1, 2, 3], OTHER[:70]]


def answers(llm: LLM, params: SamplingParams) -> list[tuple[int, ...]]:
    """One after another, so that each finds what the earlier ones left."""
    return [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_tokens_are_the_same_with_cached_pages_and_without(runner: Runner, params: SamplingParams) -> None:
    cold = LLM.from_model(runner, enable_prefix_caching=False)
    warm = LLM.from_model(runner)
    expected = answers(cold, params)
    assert answers(warm, params) == expected
    found = [output.num_cached_tokens for output in warm.generate(PROMPTS, params)]
    assert found == [128, 128, 128, 64, 128, 64]
    assert answers(warm, params) == expected
    assert warm.stats.prefix_cache_hits > 0
    assert cold.stats.prefix_cache_hits == 0


def test_a_conversation_finds_its_earlier_turns(runner: Runner) -> None:
    llm = LLM.from_model(runner)
    params = dataclasses.replace(GREEDY, max_tokens=40)
    first = llm.generate(START, params)[0]
    turn = [*START, *first.outputs[0].token_ids, 7, 8]
    second = llm.generate(turn, params)[0]
    # 150 + 39 tokens were written: two pages whole.
    assert second.num_cached_tokens == (len(START) + 39) // 64 * 64
    alone = LLM.from_model(runner, enable_prefix_caching=False).generate(turn, params)[0]
    assert second.outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_salt_keeps_requests_apart(runner: Runner) -> None:
    llm = LLM.from_model(runner)
    ask = [{"prompt_token_ids": START, "cache_salt": salt} for salt in ("a", "b", "a")]
    found = [llm.generate(prompt, GREEDY)[0].num_cached_tokens for prompt in ask]
    assert found == [0, 0, 128]
    with pytest.raises(ValueError, match="cache_salt"):
        llm.generate({"prompt_token_ids": START, "cache_salt": 3}, GREEDY)


def test_an_image_is_known_by_its_pixels_and_not_by_its_places(runner: Runner, tokenizer: Tokenizer, llm: LLM) -> None:
    """The same words around different images, and the same image around other words."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(2)]
    settings = llm.prompts._settings
    warm = LLM.from_model(runner, tokenizer, image_settings=settings)
    cold = LLM.from_model(runner, tokenizer, image_settings=settings, enable_prefix_caching=False)
    words = "x" * 70
    asked = [
        (f"a<im_patch>{words}", images[:1]),
        (f"a<im_patch>{words}", images[1:]),
        (f"a<im_patch>{words}", images[:1]),
        (f"{words}<im_patch>{words}", images[:1]),
        (f"{words}<im_patch>{words}", images[1:]),
    ]
    found = []
    for text, own in asked:
        [output] = warm.generate(text, GREEDY, images=own)
        [other] = cold.generate(text, GREEDY, images=own)
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        found.append(output.num_cached_tokens)
    # The last one shares the page before its image.
    assert found == [0, 0, 64, 0, 64]


def test_a_key_stands_for_tokens_parent_images_salt_and_format() -> None:
    ids = list(range(200))

    def keys(token_ids: list[int], root: bytes, marks: dict[int, bytes]) -> list[bytes]:
        found: list[bytes] = []
        extend_keys(found, token_ids, root, marks)
        return found

    root = root_key("fp8", "salt")
    plain = keys(ids, root, {})
    assert (len(plain), len(set(plain)), {len(key) for key in plain}) == (3, 3, {32})
    assert keys(ids[:130], root, {}) == plain[:2]
    assert keys([*ids[:64], 9, *ids[65:]], root, {})[0] == plain[0]
    assert not set(keys([9, *ids[1:]], root, {})) & set(plain)
    for other in (root_key("fp8"), root_key("int4", "salt"), root_key("fp8", "sal"), root_key("fp8sal", "t")):
        assert not set(keys(ids, other, {})) & set(plain)
    marked = [
        keys(ids, root, image_marks(places, [(digest, 4)]))
        for digest in (b"a" * 32, b"b" * 32)
        for places in ([70, 71, 72, 73], [70, 71, 72, 74])
    ]
    # The first page has no place; which token ids are places is part of the ids themselves.
    assert {one[0] for one in marked} == {plain[0]}
    assert len({one[1] for one in marked}) == 2
    assert plain[1] not in {one[1] for one in marked}


def test_an_image_over_two_pages_marks_both_with_its_part() -> None:
    marks = image_marks([62, 63, 64, 65], [(b"a" * 32, 4)])
    assert sorted(marks) == [0, 1]
    assert marks[0] != marks[1]
    with pytest.raises(ValueError, match=r"4 image places are given for images of \[3\] features"):
        image_marks([1, 2, 3, 4], [(b"a", 3)])


@pytest.mark.parametrize(
    "kv_cache_dtype", [pytest.param("fp8", marks=pytest.mark.thorough), pytest.param("int4", marks=pytest.mark.slow)]
)
def test_the_shipped_model_answers_the_same_from_a_small_cache(
    tiny_model_path: pathlib.Path, kv_cache_dtype: str
) -> None:
    image = {"type": "image", "image": str(tiny_model_path / "examples" / "number-6267.png")}
    asked = [
        [image, {"type": "text", "text": "What number is this? " * 8}],
        [image, {"type": "text", "text": "What number is this? " * 8 + "Tell me."}],
        "What is the capital of France? " * 8 + "Say it.",
        "What is the capital of France? " * 8 + "Say its name.",
    ]
    llm = LLM(tiny_model_path, max_model_len=512, max_num_seqs=2, kv_cache_dtype=kv_cache_dtype)
    params = SamplingParams(temperature=0, max_tokens=24)

    def ask(salt: str) -> list[tuple[int, tuple[int, ...]]]:
        found = []
        for content in asked:
            prompt = llm.prompts.from_chat([{"role": "user", "content": content}])
            prompt = dataclasses.replace(prompt, cache_salt=salt)
            request = llm._engine.new_request(prompt, params, 0, 32)
            [output] = [event.output for event in llm._engine.run([request]) if event.output is not None]
            found.append((output.num_cached_tokens, output.outputs[0].token_ids))
        return found

    first, again, cold = ask("a"), ask("a"), ask("b")
    assert [ids for _, ids in first] == [ids for _, ids in again] == [ids for _, ids in cold]
    assert [count for count, _ in first] == [count for count, _ in cold]
    assert all(count >= 64 for count, _ in again)
    assert first[1][0] >= 64, "the same image before other words"
