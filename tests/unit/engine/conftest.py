"""A small model with random weights and a tokenizer of single bytes, made once for all tests of the engine."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx

from step3_jax.config import ModelConfig, VisionConfig
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.model.step3 import Step3
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.text.vocabulary import byte_alphabet
from tests.small import small_text

CONTROL = (
    "<bos>",
    "<eot>",
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
)
BOS, EOT, IM_PATCH = 256, 257, 258
VOCAB_SIZE = 256 + len(CONTROL)
TEMPLATE = (
    "<bos>{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content %}{{ '<im_patch>' if item.type == 'image' else item.text }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_config() -> ModelConfig:
    text = small_text(vocab_size=VOCAB_SIZE)
    vision = VisionConfig(
        hidden_size=16,
        output_hidden_size=8,
        image_size=32,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        patch_size=4,
    )
    return ModelConfig(
        text=text,
        vision=vision,
        dtype="float32",
        image_token_id=IM_PATCH,
        image_token_len=4,
        patch_token_len=4,
        bos_token_id=BOS,
        eos_token_id=EOT,
    )


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    letters = byte_alphabet()
    added = [
        {
            "id": 256 + index,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, name in enumerate(CONTROL)
    ]
    description = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": letters, "merges": []},
    }
    return Tokenizer(json.dumps(description), bos="<bos>", eos=["<eot>"])


@pytest.fixture(scope="session")
def model() -> Step3:
    make = jax.jit(lambda: nnx.split(Step3(make_config(), rngs=nnx.Rngs(0)))[1])
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Step3(make_config(), rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, make())


@pytest.fixture(scope="session")
def runner(model: Step3) -> Runner:
    """Shared, so that each program is compiled once for all tests."""
    return Runner(model)


@pytest.fixture(scope="session")
def llm(runner: Runner, tokenizer: Tokenizer) -> LLM:
    settings = ImageSettings(image_size=32, window_size=24, max_side=96, image_token_len=4, patch_token_len=4)
    return LLM.from_model(runner, tokenizer, template=ChatTemplate(TEMPLATE), image_settings=settings)


@pytest.fixture(scope="session")
def whole_logits(model: Step3):
    """Logits of a row of 64 tokens without a cache: what the decode loop is compared with."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))

    def compute(ids: list[int]) -> np.ndarray:
        return np.asarray(call(state, np.array([ids + [0] * (64 - len(ids))]))[0], np.float64)

    return compute
