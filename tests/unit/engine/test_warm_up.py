"""Warm-up compiles everything: whatever requests ask for later, no program is left."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.model.step3 import Step3
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.structured import StructuredOutputsParams
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.tokenizer import Tokenizer
from tests.unit.engine.conftest import TEMPLATE, VOCAB_SIZE

pytest.importorskip("llguidance", reason="the extra grammar is not installed")


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What XLA compiles, by any call of JAX."""
    names: list[str] = []

    def listen(event: str, duration: float, **values: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def make_llm(model: Step3, tokenizer: Tokenizer) -> LLM:
    settings = ImageSettings(image_size=32, window_size=24, max_side=96, image_token_len=4, patch_token_len=4)
    return LLM.from_model(
        Runner(model),
        tokenizer,
        template=ChatTemplate(TEMPLATE),
        image_settings=settings,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=128,
    )


def make_prompts(count: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    prompts: list[dict[str, object]] = []
    for index in range(count):
        ids = rng.integers(0, 200, rng.integers(1, 240)).tolist()
        prompts.append({"prompt_token_ids": ids})
        if index % 4 == 0:
            size = [(32, 32), (90, 30), (96, 96)][index // 4 % 3]
            image = Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8))
            text = "".join(map(chr, rng.integers(97, 122, 12 * index)))
            prompts.append({"prompt": f"{text}<im_patch>x", "multi_modal_data": {"image": image}})
    return prompts


OPTIONS = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_k": VOCAB_SIZE - 1, "top_p": 0.8},
    {"min_p": 0.1, "logprobs": 0},
    {"presence_penalty": 1.0, "logprobs": 1},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 1.0), "logprobs": 5},
    {"min_tokens": 4, "stop_token_ids": list(range(20))},
    {"n": 3, "logprobs": 20},
    {"stop": ["e"], "temperature": 1.5},
    {"structured_outputs": StructuredOutputsParams(regex="abcdefg[a-z]{3}")},
]


def test_nothing_is_compiled_over_a_mixed_load(model: Step3, tokenizer: Tokenizer, compiled: list[str]) -> None:
    llm = make_llm(model, tokenizer)
    told: list[tuple[int, int]] = []
    llm.warm_up(lambda done, total: told.append((done, total)))
    total = told[-1][1]
    assert told == [(done, total) for done in range(total + 1)]
    assert compiled
    # One program for each entry of the table: none is traced twice.
    assert llm.stats.num_compilations == total
    compiled.clear()
    prompts = make_prompts(11)
    params = [
        SamplingParams(max_tokens=2 + index % 9, seed=index, **OPTIONS[index % len(OPTIONS)])
        for index in range(len(prompts))
    ]
    cold = llm.generate(prompts, params)
    # The same again finds its prefixes; streams, some of which are abandoned; one alone.
    warm = llm.generate(prompts, params)
    for index, _ in enumerate(llm.generate(prompts, params, stream=True)):
        if index == 9:
            break
    llm.generate(prompts[3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2))
    assert not any(output.error for output in cold + warm)
    assert [one.outputs[0].token_ids for one in cold] == [one.outputs[0].token_ids for one in warm]
    assert llm.stats.prefix_cache_hits > 0
    assert llm.stats.num_compilations == total
    assert compiled == []


def test_warm_up_leaves_running_requests_and_the_cache_as_they_are(model: Step3, tokenizer: Tokenizer) -> None:
    llm = make_llm(model, tokenizer)
    prompt = {"prompt_token_ids": list(range(100))}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    want = llm.generate(prompt, params)[0].outputs[0].token_ids
    stream = llm.generate(prompt, params, stream=True)
    got = list(next(stream).token_ids)
    llm.warm_up()
    for piece in stream:
        got += piece.token_ids
    assert tuple(got) == want
    again = llm.generate(prompt, params)[0]
    assert (again.num_cached_tokens, again.outputs[0].token_ids) == (64, want)
