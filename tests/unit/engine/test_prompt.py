"""Prompts with pictures: their places, their features, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from step3_jax.config import ModelConfig
from step3_jax.engine.llm import LLM
from step3_jax.engine.prompt import PromptBuilder, split_prompts
from step3_jax.engine.request import ContextLengthError
from step3_jax.engine.runner import Runner
from step3_jax.model.step3 import Step3
from step3_jax.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# A picture with windows of 24 (two columns, one row), and one without.
WIDE, SMALL = picture(48, 24), picture(20, 20, 1)


def test_features_go_to_their_places_windows_before_the_view(llm: LLM, model: Step3) -> None:
    text = "a<im_patch>b<im_patch>c"
    prompt = llm.prompts.from_text(text, [WIDE, SMALL])
    num_windows = [image.plan.num_patches for image in prompt.images]
    assert num_windows == [2, 0]
    [output] = llm.generate(text, GREEDY, images=[WIDE, SMALL])
    assert output.prompt_token_ids == prompt.token_ids
    made = output.outputs[0].token_ids
    logits = nnx.jit(lambda model, *args: model(*args, num_patches=num_windows))(
        model,
        np.array([[*prompt.token_ids, *made]]),
        None,
        np.stack([image.pixel_values for image in prompt.images]),
        np.concatenate([image.patch_pixel_values for image in prompt.images]),
    )
    length = len(prompt.token_ids)
    assert made == tuple(np.asarray(logits[0]).argmax(-1)[length - 1 : length + 3].tolist())


def test_prompts_with_and_without_pictures_in_one_batch_give_what_they_give_alone(llm: LLM) -> None:
    prompts, images = ["<im_patch>x", "plain", "y<im_patch>"], [[SMALL], None, [WIDE]]
    together = llm.generate(prompts, GREEDY, images=images)
    for prompt, own, output in zip(prompts, images, together, strict=True):
        [alone] = llm.generate(prompt, GREEDY, images=own)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_pictures_come_by_every_way(llm: LLM) -> None:
    want = llm.prompts.from_text("<im_patch>x", [SMALL]).token_ids
    ways = [
        llm.generate("<im_patch>x", GREEDY, images=SMALL),
        llm.generate(["<im_patch>x"], GREEDY, images=[[SMALL]]),
        llm.generate({"prompt": "<im_patch>x", "multi_modal_data": {"image": SMALL}}, GREEDY),
        llm.generate({"prompt_token_ids": [256, 258, 120], "multi_modal_data": {"image": [SMALL]}}, GREEDY),
    ]
    for [output] in ways:
        assert output.prompt_token_ids == want
    items = [{"type": "image", "image": SMALL}, {"type": "text", "text": "what?"}]
    [output] = llm.chat([{"role": "user", "content": items}], GREEDY)
    assert output.prompt == "<bos>user: <im_patch>what?\nassistant: "
    assert output.prompt_token_ids.count(258) == 4


def test_places_and_pictures_must_match(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"2 image place\(s\) for 1 image"):
        llm.generate("<im_patch><im_patch>", images=[SMALL])
    with pytest.raises(ValueError, match=r"1 image place\(s\) for 0 images"):
        llm.generate("<im_patch>")
    with pytest.raises(ValueError, match=r"0 image place\(s\) for 1 image"):
        llm.generate("no place", images=[SMALL])
    with pytest.raises(ValueError, match="both in"):
        llm.generate({"prompt": "<im_patch>", "multi_modal_data": {"image": SMALL}}, images=[SMALL])
    with pytest.raises(ValueError, match="no such file"):
        llm.generate("<im_patch>", images=["nowhere.png"])


def test_a_processor_of_other_sizes_is_refused(runner: Runner, llm: LLM) -> None:
    other = LLM.from_model(runner, llm.tokenizer)
    with pytest.raises(ValueError, match="do not match"):
        other.generate("<im_patch>", images=[SMALL])


def test_a_text_only_model_takes_no_pictures(llm: LLM) -> None:
    builder = PromptBuilder(dataclasses.replace(llm.config, vision=None), llm.tokenizer)
    with pytest.raises(ValueError, match="text-only model"):
        builder.from_text("<im_patch>", [SMALL])
    assert builder.from_ids([258]).token_ids == (258,)


def test_prompts_are_split_by_their_form() -> None:
    assert split_prompts("a", None) == [("a", [])]
    assert split_prompts([1, 2], None) == [([1, 2], [])]
    assert split_prompts([[1], "b", {"prompt": "c"}], None) == [([1], []), ("b", []), ({"prompt": "c"}, [])]
    assert split_prompts("a", ["x", "y"]) == [("a", ["x", "y"])]
    assert split_prompts(["a", "b"], ["x", None]) == [("a", ["x"]), ("b", [])]
    with pytest.raises(ValueError, match="no prompts"):
        split_prompts([], None)
    with pytest.raises(ValueError, match=r"1 entries of images are given for 2 prompt"):
        split_prompts(["a", "b"], ["x"])


def test_unknown_forms_are_refused(llm: LLM) -> None:
    for wrong in ({"text": "a"}, {"prompt": "a", "prompt_token_ids": [1]}, {"prompt": 3}, 3, [[1, "a"]], [1.5]):
        with pytest.raises(ValueError, match="prompt"):
            llm.generate(wrong)
    with pytest.raises(ValueError, match="multi_modal_data must be"):
        llm.generate({"prompt": "a", "multi_modal_data": {"video": []}})
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate("a", {"temperature": 0})


@pytest.mark.parametrize("value", [b"hello", bytearray(b"hello"), memoryview(b"hello")])
def test_bytes_are_no_token_ids(value: object) -> None:
    with pytest.raises(ValueError, match="text, a list of token ids"):
        split_prompts(value, None)  # type: ignore[arg-type]
    builder = PromptBuilder(ModelConfig(vision=None))
    for prompt in (value, {"prompt_token_ids": value}):
        with pytest.raises(ValueError, match=f"a prompt is {type(value).__name__}; text, a list of token ids"):
            builder.from_input(prompt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text is needed"):
        builder.from_input({"prompt": value})


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = llm.tokenizer.longest
    builder = PromptBuilder(llm.config, llm.tokenizer, max_model_len=4)
    assert builder.from_text("a" * 4 * longest).token_ids, "what is too long by a little is for the engine to refuse"
    monkeypatch.setattr(llm.tokenizer, "encode", None)
    with pytest.raises(ContextLengthError, match=f"{4 * longest + 1} characters, at least 5 tokens; at most .* = 4"):
        builder.from_text("a" * (4 * longest + 1))
