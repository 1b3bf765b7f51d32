"""litellm against a service: `litellm_sdk.py URL KEY IMAGE`."""

from __future__ import annotations

import base64
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Literal

import litellm
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


# The tiny model does not know how to end a free-form string in JSON, so none is asked for.
class Town(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


def check_models(url: str, key: str) -> None:
    names = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key=key, api_base=url
    )
    assert "step3-tiny" in [name.rpartition("/")[2] for name in names], names


def check_chat(asked: Mapping[str, object]) -> None:
    answer = litellm.completion(**asked)
    message = answer.choices[0].message
    assert "Paris" in message.content
    assert message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == message.reasoning_content
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usages[-1].completion_tokens == answer.usage.completion_tokens


def check_image(asked: Mapping[str, object], image: pathlib.Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    text = {"type": "text", "text": "What is this?"}
    parts = [{"type": "image_url", "image_url": {"url": url}}, text]
    seen, unseen = (
        litellm.completion(**(asked | {"messages": [{"role": "user", "content": content}]}), max_tokens=200)
        for content in (parts, [text])
    )
    assert seen.choices[0].message.content
    assert seen.usage.prompt_tokens > unseen.usage.prompt_tokens + 10, "the image takes places in the prompt"


def check_schema(asked: Mapping[str, object]) -> None:
    answer = litellm.completion(**asked, response_format=Town, max_tokens=400)
    assert answer.choices[0].finish_reason == "stop"
    Town.model_validate_json(answer.choices[0].message.content)


def check_tools(asked: Mapping[str, object]) -> None:
    asked = asked | {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER], "tool_choice": "required", "max_tokens": 400,
    }  # fmt: skip
    choice = litellm.completion(**asked).choices[0]
    (call,) = choice.message.tool_calls[:1]
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    names, arguments = [], ""
    for chunk in litellm.completion(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.index == 0:
                names += [delta.function.name] if delta.function.name else []
                arguments += delta.function.arguments or ""
    assert (names, arguments) == (["get_weather"], call.function.arguments)


def check_sampling(asked: Mapping[str, object]) -> None:
    asked = asked | {"max_tokens": 12}
    warm = asked | {"temperature": 1.5, "n": 2, "seed": 7}
    answer = litellm.completion(**warm, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    tokens = answer.choices[0].logprobs.content
    assert tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    texts = [
        [choice.message.reasoning_content for choice in one.choices] for one in (answer, litellm.completion(**warm))
    ]
    assert texts[0] == texts[1]
    first = litellm.completion(**asked).choices[0].message
    word = (first.reasoning_content or first.content).split()[1]
    stopped = litellm.completion(**asked, stop=[word]).choices[0]
    assert word not in (stopped.message.reasoning_content or "")
    assert stopped.finish_reason == "stop"


def check_errors(asked: Mapping[str, object]) -> None:
    for values, kind, said in (
        ({"temperature": -1}, litellm.BadRequestError, "temperature"),
        ({"model": "openai/another"}, litellm.NotFoundError, "another"),
        ({"api_key": "wrong"}, litellm.AuthenticationError, "key"),
    ):
        try:
            litellm.completion(**(asked | values))
        except kind as error:
            refusal = str(error)
        else:
            raise AssertionError(f"{values} was answered")
        assert said in refusal


def main() -> None:
    url, key, image = sys.argv[1:4]
    asked = {"model": "openai/step3-tiny", "api_base": url, "api_key": key, "messages": QUESTION, "temperature": 0}
    check_models(url, key)
    check_chat(asked)
    check_image(asked, pathlib.Path(image))
    check_schema(asked)
    check_tools(asked)
    check_sampling(asked)
    check_errors(asked)
    print("litellm: all checks held")


if __name__ == "__main__":
    main()
