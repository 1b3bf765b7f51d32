"""/v1/responses without stored state: the same answers as a chat's, in its own format and events."""

from __future__ import annotations

import json

import pytest

from tests.server.client import Client, Reply
from tests.server.conftest import REPLY
from tests.server.test_chat import CALL, data_url

TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    }
]


def respond(client: Client, given: object = "Hi", **values: object) -> Reply:
    return client.call("/v1/responses", {"input": given, "temperature": 0} | values)


def read_events(reply: Reply) -> list[dict]:
    """The events of a stream, whose names are both before and inside them."""
    events = []
    for block in reply.body.decode().strip().split("\n\n"):
        first, second = block.split("\n")
        event = json.loads(second.removeprefix("data: "))
        assert first == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_text_is_answered_with_items(client: Client) -> None:
    found = respond(client, store=True, metadata={"a": "b"}).json()
    assert (found["object"], found["status"], found["store"]) == ("response", "completed", False)
    assert found["metadata"] == {"a": "b"}
    reasoning, message = found["output"]
    assert (reasoning["type"], reasoning["content"][0]["text"]) == ("reasoning", "I think.")
    assert (message["type"], message["role"], message["content"][0]["text"]) == (
        *("message", "assistant"),
        "Hello there, world!",
    )
    usage = client.chat().json()["usage"]
    assert found["usage"]["output_tokens"] == usage["completion_tokens"]
    assert found["usage"]["output_tokens_details"] == usage["completion_tokens_details"]


def test_a_stream_tells_each_item_from_begin_to_end(client: Client) -> None:
    whole = respond(client).json()
    events = read_events(respond(client, stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.completed"
    for mine, other in zip(last["response"]["output"], whole["output"], strict=True):
        assert mine | {"id": other["id"]} == other
    for kind, text in (("reasoning_text", "I think."), ("output_text", "Hello there, world!")):
        deltas = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == text
        (done,) = (event["text"] for event in events if event["type"] == f"response.{kind}.done")
        assert done == text
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"]["id"] for event in events if event["type"] == "response.output_item.done"]
    assert added == done == [item["id"] for item in last["response"]["output"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_an_item(client: Client, stream: bool) -> None:
    reply = respond(client, CALL, tools=TOOLS, stream=stream)
    if stream:
        events = read_events(reply)
        deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
        assert json.loads("".join(deltas)) == {"city": "Graz", "days": 3}
        found = events[-1]["response"]
    else:
        found = reply.json()
    *_, call = found["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Graz", "days": 3}
    assert call["call_id"]


def test_items_become_messages(client: Client) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Graz"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is sunny."}]},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url((8, 8)), "detail": "auto"},
                {"type": "input_text", "text": "SAY </think>ok"},
            ],
        },
    ]
    seen: list[str] = []
    reply = client.executor.reply
    client.executor.reply = lambda prompt: seen.append(prompt) or reply(prompt)
    try:
        found = respond(client, items, instructions="You are kind.").json()
    finally:
        client.executor.reply = reply
    assert found["output"][0]["content"][0]["text"] == "ok"
    (prompt,) = seen
    assert " You are kind. " in prompt
    assert " Be brief. " in prompt
    assert '<steptml:parameter name="city">Graz</steptml:parameter>' in prompt
    assert "<|BOT|>tool\n sun <|EOT|>" in prompt
    assert " It is sunny. " in prompt


def test_a_length_leaves_it_incomplete(client: Client) -> None:
    found = respond(client, max_output_tokens=2).json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert read_events(respond(client, max_output_tokens=2, stream=True))[-1]["type"] == "response.incomplete"


def test_the_form_of_the_text_is_held_to(client: Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    found = respond(client, 'SAY Hm.</think>{"a":1}', text=form).json()
    assert found["output"][1]["content"][0]["text"] == '{"a":1}'
    found = respond(client, "SAY </think>fine", reasoning={"effort": "none"}).json()
    assert "fine" in found["output"][0]["content"][0]["text"]


def test_an_error_ends_a_stream_with_an_event(client: Client) -> None:
    client.executor.failure = RuntimeError("out of memory")
    events = read_events(respond(client, stream=True))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "server_error"
    client.executor.failure = RuntimeError("out of memory")
    assert respond(client).status == 500


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": [{"text": "hm"}]}]}, "input"),
        ({"input": "long " * 3000}, "input"),
        ({"max_output_tokens": 2048}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "odd"}}}}, "text.format"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused(client: Client, values: dict[str, object], param: str) -> None:
    reply = respond(client, **({"given": values.pop("input")} if "input" in values else {}), **values)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert REPLY not in reply.body.decode()
