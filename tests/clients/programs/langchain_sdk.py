"""langchain-openai against a service: `langchain_sdk.py URL KEY IMAGE`."""

from __future__ import annotations

import asyncio
import base64
import pathlib
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of France?"


# The tiny model does not know how to end a free-form string in JSON, so none is asked for.
class Town(BaseModel):
    """A town."""

    name: Literal["Paris", "Rome"]
    is_capital: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def check_chat(chat: ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usages[-1]["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert asyncio.run(chat.ainvoke(QUESTION)).content == answer.content


def check_image(chat: ChatOpenAI, image: pathlib.Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    text = {"type": "text", "text": "What is this?"}
    seen = chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": url}}, text])])
    unseen = chat.invoke([HumanMessage([text])])
    assert seen.content
    assert seen.usage_metadata["input_tokens"] > unseen.usage_metadata["input_tokens"] + 10


def check_schema_and_tools(chat: ChatOpenAI) -> None:
    town = chat.with_structured_output(Town, method="json_schema").invoke(QUESTION)
    assert isinstance(town, Town)
    caller = chat.bind_tools([get_weather], tool_choice="required")
    called = caller.invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather"
    assert called.tool_calls[0]["args"]["city"] in ("Paris", "Rome")
    first, *others = caller.stream("What is the weather in Paris?")
    for chunk in others:
        first += chunk
    assert [call["args"] for call in first.tool_calls] == [call["args"] for call in called.tool_calls]


def check_sampling(chat: ChatOpenAI) -> None:
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = scored.response_metadata["logprobs"]["content"]
    assert tokens
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
    warm = {"n": 2, "seed": 7, "temperature": 1.5}
    texts = [[one.text for one in chat.generate([[HumanMessage(QUESTION)]], **warm).generations[0]] for _ in range(2)]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]
    word = scored.content.split()[1]
    assert word not in chat.invoke(QUESTION, stop=[word]).content


def check_errors(chat: ChatOpenAI, url: str) -> None:
    stranger = ChatOpenAI(model="step3-tiny", base_url=url, api_key="wrong", max_retries=0)
    for one, kind, said in (
        (chat.bind(temperature=-1), openai.BadRequestError, "temperature"),
        (chat.bind(model="another"), openai.NotFoundError, "another"),
        (stranger, openai.AuthenticationError, "key"),
    ):
        try:
            one.invoke(QUESTION)
        except kind as error:
            refusal = str(error)
        else:
            raise AssertionError(f"there was no {kind.__name__}")
        assert said in refusal


def main() -> None:
    url, key, image = sys.argv[1:4]
    chat = ChatOpenAI(model="step3-tiny", base_url=url, api_key=key, temperature=0, max_tokens=400, max_retries=0)
    check_chat(chat)
    check_image(chat, pathlib.Path(image))
    check_schema_and_tools(chat)
    check_sampling(chat)
    check_errors(chat, url)
    print("langchain-openai: all checks held")


if __name__ == "__main__":
    main()
