"""Applications with a model that says what it is told to say."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator

import pytest

from step3_jax.config import ModelConfig
from step3_jax.engine.llm import LLM
from step3_jax.server.app import build_app
from step3_jax.server.config import ServerConfig
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.tokenizer import Tokenizer
from tests.server.client import Client, opened
from tests.server.fake import Reply, ReplyExecutor

NAME = "toy"
# By default, this is what the model thinks and answers.
REPLY = "I think.</think>Hello there, world!"

Open = Callable[..., contextlib.AbstractContextManager[Client]]


@pytest.fixture(scope="session")
def open_client(tiny_model_path: pathlib.Path) -> Open:
    """Opens an application: its settings by name, the engine's as `engine`, generation_config.json's as `stored`."""
    config = ModelConfig.preset("step3-tiny")
    tokenizer, template = Tokenizer.load(tiny_model_path), ChatTemplate.load(tiny_model_path)
    settings = ImageSettings.load(tiny_model_path)
    generation = json.loads((tiny_model_path / "generation_config.json").read_text())

    @contextlib.contextmanager
    def open_client(
        reply: Reply | str = REPLY,
        engine: dict[str, object] | None = None,
        stored: dict[str, object] | None = None,
        **values: object,
    ) -> Iterator[Client]:
        executor = ReplyExecutor(config, tokenizer, (lambda prompt: reply) if isinstance(reply, str) else reply)
        llm = LLM.from_model(
            executor,
            tokenizer,
            template=template,
            image_settings=settings,
            generation_config=generation | (stored or {}),
            **(engine or {}),
        )
        app = build_app(llm, ServerConfig(**({"served_model_name": (NAME,)} | values)))
        with opened(app, executor) as client:
            yield client

    return open_client


@pytest.fixture(scope="module")
def client(open_client: Open) -> Iterator[Client]:
    """Shared by a module's tests that change nothing: what a prompt has after SAY is what the model writes."""
    with open_client(_read_reply) as made:
        yield made


def _read_reply(prompt: str) -> str:
    _, found, text = prompt.rpartition("SAY ")
    return text.partition(" <|EOT|>")[0] if found else REPLY
