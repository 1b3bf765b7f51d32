"""The openai client, version 2 or 3, against a service: `openai_sdk.py URL KEY IMAGE`; prints each check that held."""

from __future__ import annotations

import asyncio
import base64
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

import openai
from pydantic import BaseModel

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        # Version 2 streams no other tools with its helper.
        "strict": True,
    },
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


# The tiny model does not know how to end a free-form string in JSON, so none is asked for.
class Town(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


def check_models(client: openai.OpenAI) -> str:
    """The name of the one model."""
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    return model.id


def check_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "Paris" in choice.message.content
    assert choice.message.reasoning_content == choice.message.reasoning
    assert "<think>" not in choice.message.content
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.completion_tokens_details.reasoning_tokens <= usage.completion_tokens
    again = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, temperature=0)
    assert again.headers["x-request-id"]
    assert again.parse().choices[0].message.content == choice.message.content
    assert (
        client.completions.create(model=model, prompt="The sun", max_tokens=4, temperature=0).usage.completion_tokens
        <= 4
    )


def check_stream(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[-1].choices
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    reasoning = "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
    assert reasoning == (whole.choices[0].message.reasoning_content or "")
    assert choices[-1].finish_reason == "stop"
    with client.chat.completions.create(model=model, messages=QUESTION, stream=True) as left:
        next(iter(left))


def check_image(client: openai.OpenAI, model: str, image: pathlib.Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, max_completion_tokens=200
    )
    assert answer.choices[0].message.content
    text_alone = [{"role": "user", "content": "What is this?"}]
    without = client.chat.completions.create(model=model, messages=text_alone, max_tokens=1)
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens + 10, "the image takes places in the prompt"


def check_schema(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=Town, temperature=0, max_tokens=400
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop", choice
    assert isinstance(choice.message.parsed, Town)


def check_tools(client: openai.OpenAI, model: str) -> None:
    asked = {
        "model": model, "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER], "tool_choice": "required", "temperature": 0, "max_tokens": 400,
    }  # fmt: skip
    choice = client.chat.completions.create(**asked).choices[0]
    (call,) = choice.message.tool_calls[:1]
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    names, arguments, reason = [], "", None
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.index == 0:
                names += [delta.function.name] if delta.function.name else []
                arguments += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (names, arguments, reason) == (["get_weather"], call.function.arguments, "tool_calls")
    messages = [
        *asked["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."},
    ]
    answer = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], max_tokens=40)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def check_sampling(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "messages": QUESTION, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, n=2, seed=7, temperature=1.5, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    tokens = answer.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 and token.bytes is not None for token in tokens)
    again = client.chat.completions.create(**asked, n=2, seed=7, temperature=1.5)
    assert [choice.message.reasoning_content for choice in again.choices] == [
        choice.message.reasoning_content for choice in answer.choices
    ]
    first = client.chat.completions.create(**asked, temperature=0)
    text = first.choices[0].message.reasoning_content or first.choices[0].message.content
    word = text.split()[1]
    stopped = client.chat.completions.create(**asked, temperature=0, stop=[word])
    assert word not in (stopped.choices[0].message.reasoning_content or "")
    assert stopped.choices[0].finish_reason == "stop"


def catch(kind: type[openai.APIStatusError], ask: Callable[[], object]) -> openai.APIStatusError:
    """The error that a request fails with."""
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"there was no {kind.__name__}")


def check_errors(client: openai.OpenAI, model: str) -> None:
    create, asked = client.chat.completions.create, {"model": model, "messages": QUESTION}
    assert catch(openai.NotFoundError, lambda: create(**(asked | {"model": "another"}))).code == "model_not_found"
    assert catch(openai.BadRequestError, lambda: create(**asked, temperature=-1)).param == "temperature"
    stranger = client.with_options(api_key="wrong")
    assert catch(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"


async def check_async(url: str, key: str, model: str, image: pathlib.Path) -> None:
    """The same with the asynchronous client, all at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        assert [one.id async for one in client.models.list()] == [model]
        await asyncio.gather(
            check_async_chat(client, model),
            check_async_forms(client, model, image),
            check_async_sampling(client, model),
            check_async_errors(client, model),
        )


async def check_async_chat(client: openai.AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": QUESTION, "temperature": 0}
    whole = await client.chat.completions.create(**asked)
    create = client.chat.completions.create
    streams = [create(**asked, stream=True, stream_options={"include_usage": True}) for _ in range(3)]
    for stream in await asyncio.gather(*streams):
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def check_async_forms(client: openai.AsyncOpenAI, model: str, image: pathlib.Path) -> None:
    asked = {"model": model, "temperature": 0, "max_tokens": 400}
    answer = await client.chat.completions.parse(**asked, messages=QUESTION, response_format=Town)
    assert isinstance(answer.choices[0].message.parsed, Town)
    weather = [{"role": "user", "content": "What is the weather in Paris?"}]
    async with client.chat.completions.stream(
        **asked, messages=weather, tools=[WEATHER], tool_choice="required"
    ) as stream:
        called = (await stream.get_final_completion()).choices[0]
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    seen = await client.chat.completions.create(**asked, messages=[{"role": "user", "content": content}])
    assert seen.choices[0].message.content


async def check_async_sampling(client: openai.AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": QUESTION, "max_tokens": 12}
    warm = asked | {"n": 2, "seed": 7, "temperature": 1.5, "logprobs": True, "top_logprobs": 2}
    answers = await asyncio.gather(*(client.chat.completions.create(**warm) for _ in range(2)))
    texts = [[choice.message.reasoning_content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert all(len(token.top_logprobs) == 2 for token in answers[0].choices[0].logprobs.content)
    first = (await client.chat.completions.create(**asked, temperature=0)).choices[0].message
    word = (first.reasoning_content or first.content).split()[1]
    stopped = (await client.chat.completions.create(**asked, temperature=0, stop=[word])).choices[0]
    assert (word in (stopped.message.reasoning_content or ""), stopped.finish_reason) == (False, "stop")


async def check_async_errors(client: openai.AsyncOpenAI, model: str) -> None:
    asked = [{"model": "another"}, {"model": model, "temperature": -1}]
    answers = (client.chat.completions.create(**values, messages=QUESTION) for values in asked)
    missing, wrong = await asyncio.gather(*answers, return_exceptions=True)
    assert isinstance(missing, openai.NotFoundError)
    assert isinstance(wrong, openai.BadRequestError)
    assert (missing.param, wrong.param) == ("model", "temperature")


def main() -> None:
    url, key, image = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    model = check_models(client)
    check_chat(client, model)
    check_stream(client, model)
    check_image(client, model, pathlib.Path(image))
    check_schema(client, model)
    check_tools(client, model)
    check_sampling(client, model)
    check_errors(client, model)
    asyncio.run(check_async(url, key, model, pathlib.Path(image)))
    print(f"openai {openai.__version__}: all checks held")


if __name__ == "__main__":
    main()
