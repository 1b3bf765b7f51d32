"""langchain-openai against a service: `langchain_sdk.py URL KEY`."""

from __future__ import annotations

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


# The tiny model does not know how to end a free-form string in JSON, so none is asked for.
class Town(BaseModel):
    """A town."""

    name: Literal["Paris", "Rome"]
    is_capital: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def main() -> None:
    url, key = sys.argv[1:3]
    chat = ChatOpenAI(model="step3-tiny", base_url=url, api_key=key, temperature=0, max_tokens=400)
    question = "What is the capital of France?"
    answer = chat.invoke(question)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    assert "".join(chunk.content for chunk in chat.stream(question)) == answer.content
    town = chat.with_structured_output(Town, method="json_schema").invoke(question)
    assert isinstance(town, Town)
    called = chat.bind_tools([get_weather], tool_choice="required").invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather"
    assert called.tool_calls[0]["args"]["city"] in ("Paris", "Rome")
    print("langchain-openai: all checks held")


if __name__ == "__main__":
    main()
