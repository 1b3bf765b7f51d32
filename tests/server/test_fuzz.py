"""Bodies of every wrong kind: each is answered, none with a server error, and nothing is left behind."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator

import pytest

from tests.process import anonymous_kib
from tests.server.client import Client, ask
from tests.server.conftest import Open
from tests.server.test_chat import CALL, TOOLS

VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 1e308, -1.5, "", "x", "a" * 300, "\u0000", "Grüße 🎻"),
    *([], {}, [[]], [{}], {"a": 1}, ["x"], [1, 2], [None], [[1], [2]], {"type": "text"}, {"type": "function"}),
    *(
        "auto",
        "none",
        "required",
        "user",
        "assistant",
        "<think>",
        "</think>",
        "<im_patch>",
        "data:image/png;base64,AAAA",
    ),
]
BODIES: dict[str, list[dict[str, object]]] = {
    "/v1/chat/completions": [
        ask("SAY </think>hi", max_tokens=4),
        ask(CALL, tools=TOOLS, max_tokens=8, stream=True, stream_options={"include_usage": True}),
        ask("hi", n=2, stop=["a"], logprobs=True, top_logprobs=2, logit_bias={"5": 1}, seed=1, max_tokens=4),
        ask("hi", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, max_tokens=4),
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1},
        {"prompt": [5, 6], "max_tokens": 2, "stream": True, "n": 2},
    ],
    "/v1/responses": [
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "max_output_tokens": 3}
    ],
    "/tokenize": [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    "/detokenize": [{"tokens": [1, 2]}],
}


def mutate(value: object, dice: random.Random) -> object:
    """The same with a value replaced somewhere."""
    if dice.random() < 0.25:
        return dice.choice(VALUES)
    if isinstance(value, dict) and value:
        key = dice.choice(list(value))
        how = dice.random()
        if how < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if how < 0.2:
            return value | {
                dice.choice(["n", "stop", "tools", "zzz", "content", "type", "max_tokens"]): dice.choice(VALUES)
            }
        return value | {key: mutate(value[key], dice)}
    if isinstance(value, list) and value:
        place = dice.randrange(len(value))
        return [*value[:place], mutate(value[place], dice), *value[place + 1 :]]
    return dice.choice(VALUES)


def break_text(text: bytes, dice: random.Random) -> bytes:
    """The same with bytes lost, doubled or changed."""
    place = dice.randrange(len(text))
    changes: list[Callable[[], bytes]] = [
        lambda: text[:place],
        lambda: text[:place] + bytes([dice.randrange(256)]) + text[place + 1 :],
        lambda: text[:place] + text[place:] * 2,
        lambda: text[:place] + b"[" * dice.randrange(200) + text[place:],
    ]
    return dice.choice(changes)()


def run(client: Client, count: int) -> int:
    """Returns by how many KiB the process grew after the first tenth."""
    client.executor.is_stubborn = False
    dice = random.Random(0)
    before_kib = 0
    for number in range(count):
        if number == count // 10:
            before_kib = anonymous_kib()
        path = dice.choice(list(BODIES))
        body: object = dice.choice(BODIES[path])
        for _ in range(dice.randrange(1, 4)):
            body = mutate(body, dice)
        text = json.dumps(body).encode()
        if number % 5 == 0:
            text = break_text(text, dice)
        reply = client.call(path, text)
        assert reply.status in (200, 400, 404), (path, text, reply.body)
        if reply.status >= 400:
            assert set(reply.error) == {"message", "type", "param", "code"}
            assert len(reply.error["message"]) <= 1024
        else:
            assert b'"error":{' not in reply.body, (path, text, reply.body)
    assert client.service.admission.num_requests == 0
    core = client.service.llm.core
    assert not core.has_work
    assert core.allocator.num_free == core.allocator.num_pages
    return anonymous_kib() - before_kib


@pytest.fixture
def short(open_client: Open) -> Iterator[Client]:
    """With a short context, as many of these requests run to its end."""
    with open_client(engine={"max_model_len": 256}) as client:
        yield client


def test_wrong_bodies_are_answered(short: Client) -> None:
    run(short, 300)


@pytest.mark.slow
def test_very_many_wrong_bodies_are_answered(short: Client) -> None:
    """The same for some minutes, or for as many as `$STEP3_TEST_FUZZ_BODIES` says, with the same memory."""
    assert run(short, int(os.environ.get("STEP3_TEST_FUZZ_BODIES", "100000"))) < 16 * 1024
