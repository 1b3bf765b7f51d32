"""litellm against a service: `litellm_sdk.py URL KEY`."""

from __future__ import annotations

import sys

import litellm

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    url, key = sys.argv[1:3]
    asked = {"model": "openai/step3-tiny", "api_base": url, "api_key": key, "messages": QUESTION, "temperature": 0}
    answer = litellm.completion(**asked)
    message = answer.choices[0].message
    assert "Paris" in message.content
    assert message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(litellm.completion(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    joined = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert joined == message.reasoning_content
    try:
        litellm.completion(**(asked | {"temperature": -1}))
    except litellm.BadRequestError as error:
        refusal = str(error)
    else:
        raise AssertionError("a temperature of -1 was answered")
    assert "temperature" in refusal
    print("litellm: all checks held")


if __name__ == "__main__":
    main()
