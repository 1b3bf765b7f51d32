"""The shipped model in a separate process, called by OpenAI's own client, unmodified."""

from __future__ import annotations

import base64
import json
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Literal

import openai
import pydantic
import pytest

from tests.server.running import Running, running

QUESTION = [{"role": "user", "content": "What is a violin?"}]
# What the tiny model was trained on.
ANSWER = "A violin is a bowed stringed instrument"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    # Without warm-up: what these requests need is compiled as they arrive.
    words = ["serve", "--port", "0", "--no-warm-up", "--api-key", "k", "--served-model-name", "tiny"]
    words += ["--max-num-seqs", "4", "--max-model-len", "512"]
    with running(["-m", "step3_jax", *words]) as server:
        server.wait_for("ready: ")
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="k", max_retries=0, timeout=120
    ) as client:
        yield client


def ask(client: openai.OpenAI, messages: object = QUESTION, **values: object) -> object:
    return client.chat.completions.create(
        model="tiny", messages=messages, **({"temperature": 0, "max_tokens": 64} | values)
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "step3"


def test_an_answer_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    message = whole.choices[0].message
    assert message.content.startswith(ANSWER)
    assert message.reasoning_content
    assert whole._request_id
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content == message.content
    reasoning = (getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks if chunk.choices)
    assert "".join(piece or "" for piece in reasoning) == message.reasoning_content
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens > 0
    assert usage.prompt_tokens_details.cached_tokens == 0, "it is shorter than a page"


def test_an_image_is_seen(client: openai.OpenAI, tiny_model_path: pathlib.Path) -> None:
    data = base64.b64encode((tiny_model_path / "examples" / "guitar.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is this?"},
    ]
    assert "guitar" in ask(client, [{"role": "user", "content": parts}]).choices[0].message.content


def test_seeded_answers_repeat_and_others_differ(client: openai.OpenAI) -> None:
    def answers(seed: int, n: int = 2) -> list[str]:
        found = ask(client, temperature=2.0, seed=seed, n=n, max_tokens=16)
        return [choice.message.model_dump_json() for choice in found.choices]

    assert answers(1) == answers(1)
    assert len({*answers(1), *answers(2)}) == 4
    assert len(ask(client, n=3).choices) == 3


def test_stop_log_probabilities_and_length(client: openai.OpenAI) -> None:
    stopped = ask(client, stop=[" stringed"]).choices[0]
    assert stopped.message.content == "A violin is a bowed"
    assert stopped.finish_reason == "stop"
    found = ask(client, logprobs=True, top_logprobs=3, max_tokens=5).choices[0]
    assert found.finish_reason == "length"
    assert len(found.logprobs.content) == 5
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in found.logprobs.content)
    old = client.completions.create(model="tiny", prompt="A violin is", temperature=0, max_tokens=4, logprobs=2)
    assert len(old.choices[0].logprobs.tokens) == 4
    # The same tokens as a prompt have the same log-probabilities.
    prompt = "A violin is" + old.choices[0].text
    scored = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == prompt
    assert scored.choices[0].logprobs.token_logprobs[-4:] == pytest.approx(
        old.choices[0].logprobs.token_logprobs, abs=1e-3
    )


def test_an_answer_is_parsed_by_its_schema(client: openai.OpenAI) -> None:
    class Trip(pydantic.BaseModel):
        city: Literal["Graz", "Wien"]
        days: int = pydantic.Field(ge=1, le=30)

    found = client.chat.completions.parse(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=100, response_format=Trip
    ).choices[0]
    assert found.finish_reason == "stop"
    assert found.message.parsed.city in ("Graz", "Wien")
    assert found.message.reasoning_content


def test_a_call_is_made_if_it_is_asked_for(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Graz", "Wien"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    (call,) = ask(client, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Graz", "Wien")


def test_tools_are_taken_and_a_whole_stream_is_put_together(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    assert ask(client, tools=tools, max_tokens=8).choices[0].finish_reason == "length"
    with client.chat.completions.stream(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=64, tools=tools
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"


def test_responses_are_the_same_answers(client: openai.OpenAI) -> None:
    found = client.responses.create(model="tiny", input="What is a violin?", temperature=0, max_output_tokens=64)
    assert found.status == "completed"
    assert found.output_text.startswith(ANSWER)
    with client.responses.stream(
        model="tiny", input="What is a violin?", temperature=0, max_output_tokens=64
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == found.output_text


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, max_tokens=10**6)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_leaving_a_stream_frees_its_place(client: openai.OpenAI, server: Running) -> None:
    before = server.metric("generation_tokens_total")
    stream = ask(client, stream=True, max_tokens=480, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    # Bounded by the process's own time limit.
    while server.metric("num_requests_running"):
        time.sleep(0.05)
    assert server.metric("generation_tokens_total") - before < 480
    assert server.metric("kv_cache_usage_perc") == 0


def test_a_client_that_does_not_read_holds_nobody_up(client: openai.OpenAI, server: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 480, "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 20}
    # More than the system's own buffers hold.
    lazy = server.send("/v1/chat/completions", body | {"stream": True}, key="k")
    assert ask(client, max_tokens=3).choices
    lazy.close()
    while server.metric("num_requests_running"):
        time.sleep(0.05)
    assert ask(client, max_tokens=3).choices


def test_it_drains_at_the_end(client: openai.OpenAI, server: Running) -> None:
    stream = ask(client, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    chunks = [next(iter(stream))]
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("shutting down")
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.wait() == 0
    log = json.dumps(server.said)
    assert "POST /v1/chat/completions 200" in log
    assert "violin" not in log
