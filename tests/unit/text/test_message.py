"""Messages in the formats of OpenAI's clients, vLLM and transformers."""

from __future__ import annotations

import pytest
from PIL import Image

from step3_jax.text.message import collect_images, normalise_messages

ARGUMENTS = {"city": "Oslo", "days": 2}


def _content(content, role="user"):
    return normalise_messages([{"role": role, "content": content}])[0]["content"]


def _calling(**call):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", **call}]}


def _arguments(value):
    (message,) = normalise_messages([_calling(function={"name": "weather", "arguments": value})])
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ARGUMENTS, ARGUMENTS),
        ('{"city": "Oslo", "days": 2}', ARGUMENTS),
        ("{}", {}),
        ("", {}),
        (" \n", {}),
        (None, {}),
    ],
)
def test_arguments_of_a_tool_call_become_an_object(given, expected):
    assert _arguments(given) == expected


@pytest.mark.parametrize("given", ['{"city": "Os', "[1]", "3", '"{}"', "null and void", [1], "[" * 100_000])
def test_arguments_that_are_no_object_are_refused_with_the_function_and_the_message(given):
    with pytest.raises(ValueError, match=r"arguments of 'weather' in message 0 are .*give an object or its JSON text"):
        _arguments(given)


def test_the_short_form_of_a_tool_call_is_served_and_arguments_may_be_missing():
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g"}]}
    calls = normalise_messages([message])[0]["tool_calls"]
    assert calls == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize("calls", [None, [], ()])
def test_tool_calls_without_a_call_are_left_out(calls):
    message = {"role": "assistant", "content": "hi", "tool_calls": calls}
    assert normalise_messages([message]) == [{"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("f()", "tool_calls of type str"),
        (["f()"], "not a function's"),
        ([{"type": "custom", "custom": {"name": "f"}}], "not a function's"),
        ([{"type": "function"}], "no function name"),
        ([{"function": {"arguments": {}}}], "no function name"),
    ],
)
def test_tool_calls_of_other_forms_are_refused(calls, message):
    with pytest.raises(ValueError, match=message):
        normalise_messages([{"role": "assistant", "tool_calls": calls}])


def test_the_messages_given_are_left_unchanged():
    message = _calling(function={"name": "f", "arguments": "{}"})
    normalise_messages([message])
    assert message["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    "item",
    [
        "hello",
        {"type": "text", "text": "hello"},
        {"type": "input_text", "text": "hello"},
        {"type": "output_text", "text": "hello", "annotations": []},
        {"type": "refusal", "refusal": "hello"},
        {"type": "thinking", "thinking": "hello"},
        {"text": "hello"},
    ],
)
def test_texts_of_a_content_list_may_be_written_in_every_known_form(item):
    assert _content([item], role="assistant") == [{"type": "text", "text": "hello"}]


def test_a_null_text_in_a_content_list_is_passed_over():
    assert _content([{"type": "text", "text": None}, "a"]) == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
        {"type": "image_pil", "image_pil": "a.png"},
        {"image_url": "a.png"},
        {"image": "a.png"},
    ],
)
def test_images_of_a_content_list_may_be_written_in_every_known_form(item):
    messages = [{"role": "user", "content": [item, "what?"]}]
    assert collect_images(messages) == ["a.png"]
    assert normalise_messages(messages)[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]


def test_an_image_in_memory_and_bare_base64_are_sources():
    image = Image.new("RGB", (2, 2))
    content = [{"type": "image_pil", "image_pil": image}, {"type": "image", "base64": "AA=="}]
    found = collect_images([{"role": "user", "content": content}])
    assert found[0] is image
    assert found[1] == "data:;base64,AA=="


@pytest.mark.parametrize("item", [{"type": "input_image", "file_id": "f"}, {"type": "image_url", "image_url": None}])
def test_an_image_without_a_source_is_refused(item):
    with pytest.raises(ValueError, match="image of message 0 has no source"):
        collect_images([{"role": "user", "content": [item]}])


@pytest.mark.parametrize(
    ("role", "expected"), [("tool", ""), ("user", ""), ("system", ""), ("developer", ""), ("assistant", None)]
)
def test_null_content_is_empty(role, expected):
    assert _content(None, role) == expected


def test_content_may_be_missing_where_there_may_be_none():
    for role in ("assistant", "tool"):
        normalise_messages([{"role": role}])
    with pytest.raises(ValueError, match="role system has no content"):
        normalise_messages([{"role": "system", "text": "be kind"}])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "item that is int"),
        (None, "item that is NoneType"),
        ({"type": "audio"}, "type 'audio'.*input_text.*image_pil"),
        ({"type": ["text"]}, "type \\['text'\\]"),
        ({"type": "text", "text": 3}, "no text"),
        ({"type": "refusal", "text": "no"}, "refusal item of message 0 has no text"),
    ],
)
def test_content_items_of_other_forms_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        _content([item])
