"""/v1/chat/completions: what is asked for comes back, whole and as a stream alike."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from tests.server.client import Client, Reply, ask
from tests.server.conftest import NAME, REPLY, Open

CALL = (
    "SAY I think.</think>Let me look.<｜tool_calls_begin｜>\n<｜tool_call_begin｜>\nfunction<｜tool_sep｜>"
    '<steptml:invoke name="weather"><steptml:parameter name="city">Graz</steptml:parameter>'
    '<steptml:parameter name="days">3</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n<｜tool_calls_end｜>'
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


def data_url(size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def join(reply: Reply, index: int = 0) -> dict[str, object]:
    """What the pieces of a stream are together."""
    found: dict[str, object] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": {}, "logprobs": []}
    for event in reply.events:
        for choice in (one for one in event["choices"] if one["index"] == index):
            for name in ("content", "reasoning", "reasoning_content"):
                found[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls", ()):
                known = found["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {"id": call["id"], "name": call["function"]["name"]} if "id" in call else {}
                known["arguments"] += call["function"]["arguments"]
            if choice.get("logprobs"):
                found["logprobs"] += choice["logprobs"]["content"]
            found["finish_reason"] = choice["finish_reason"]
    return found


def test_an_answer_has_its_parts(client: Client) -> None:
    reply = client.chat()
    answer = reply.json()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert (answer["object"], answer["model"]) == ("chat.completion", NAME)
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello there, world!",
        "refusal": None,
        "reasoning": "I think.",
        "reasoning_content": "I think.",
    }
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client: Client) -> None:
    reply = client.chat(stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    first, *_, last = reply.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    found = join(reply)
    assert (found["content"], found["reasoning"]) == ("Hello there, world!", "I think.")
    assert found["reasoning_content"] == found["reasoning"]
    assert not any("usage" in event for event in reply.events)


def test_usage_has_its_details_whole_and_streamed(client: Client) -> None:
    whole = client.chat("usage " * 100).json()["usage"]
    reply = client.chat("usage " * 100, stream=True, stream_options={"include_usage": True})
    *chunks, last = reply.events
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert whole["completion_tokens_details"]["reasoning_tokens"] == len(
        client.service.llm.tokenizer.encode("I think.")
    )
    assert whole["prompt_tokens_details"]["cached_tokens"] == 0
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert last["usage"][name] == whole[name]
    assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"]


def test_running_usage_grows_to_the_whole(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [event["usage"]["completion_tokens"] for event in client.chat(stream=True, stream_options=options).events]
    assert counts == sorted(counts)
    alone = client.chat(stream=True, stream_options={"include_usage": False, "continuous_usage_stats": True}).events
    assert not any("usage" in event for event in alone)
    assert counts[0] == 0
    assert counts[-1] == client.chat().json()["usage"]["completion_tokens"]


def test_a_call_is_told_apart_whole_and_streamed(client: Client) -> None:
    whole = client.chat(CALL, tools=TOOLS).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Graz", "days": 3}'}
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", "Let me look.")
    reply = client.chat(CALL, tools=TOOLS, stream=True)
    found = join(reply)
    assert found["content"] == "Let me look."
    assert found["finish_reason"] == "tool_calls"
    (streamed,) = found["calls"].values()
    assert (streamed["name"], streamed["arguments"]) == ("weather", call["function"]["arguments"])
    parts = [one for event in reply.events for one in event["choices"][0]["delta"].get("tool_calls", ())]
    assert (parts[0]["type"], parts[0]["function"]["arguments"]) == ("function", "")
    assert all(set(part) == {"index", "function"} for part in parts[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_none_wherever_it_is_cut(client: Client, stream: bool) -> None:
    count = client.chat(CALL, tools=TOOLS).json()["usage"]["completion_tokens"]
    for max_tokens in range(1, count, 3):
        reply = client.chat(CALL, tools=TOOLS, max_tokens=max_tokens, stream=stream)
        if stream:
            found = join(reply)
            reason, calls = found["finish_reason"], found["calls"]
        else:
            choice = reply.json()["choices"][0]
            reason, calls = choice["finish_reason"], choice["message"].get("tool_calls", ())
        assert reason == "length", max_tokens
        assert not calls or max_tokens > count - 12, max_tokens


def test_without_tools_or_with_none_nothing_is_parsed(client: Client) -> None:
    for values in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat(CALL, **values).json()["choices"][0]
        assert "tool_calls" not in choice["message"]
        assert "steptml" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


def test_a_length_inside_the_reasoning_leaves_no_content(client: Client) -> None:
    choice = client.chat(max_tokens=2).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)
    assert choice["message"]["reasoning"] == "I think"


def test_reasoning_is_left_out_if_it_is_not_wanted(client: Client) -> None:
    answer = client.chat(include_reasoning=False).json()
    message = answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert (message["content"], "reasoning" in message) == ("Hello there, world!", False)
    assert "reasoning" not in client.chat(include_reasoning=False, stream=True).body.decode()


def test_reasoning_effort_none_closes_the_reasoning_at_once(client: Client) -> None:
    answer = client.chat("SAY No thoughts.", reasoning_effort="none", return_token_ids=True).json()
    tokenizer = client.service.llm.tokenizer
    assert tokenizer.decode(answer["prompt_token_ids"]).endswith("<think>\n</think>")
    assert answer["choices"][0]["message"]["content"] == "No thoughts."
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert client.chat("SAY Some.", reasoning_effort="low").json()["choices"][0]["message"]["reasoning"] == "Some."


def test_the_newer_name_of_max_tokens_goes_first(client: Client) -> None:
    answer = client.chat(max_completion_tokens=3, max_tokens=1).json()
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_equal_answers_are_computed_once_and_given_n_times(client: Client, stream: bool) -> None:
    before = client.executor.num_decoded
    reply = client.chat(n=3, stream=stream)
    num_decoded = client.executor.num_decoded - before
    if stream:
        contents = [join(reply, index)["content"] for index in range(3)]
    else:
        contents = [choice["message"]["content"] for choice in reply.json()["choices"]]
        assert reply.json()["usage"]["completion_tokens"] == 3 * num_decoded
    assert contents == ["Hello there, world!"] * 3
    assert num_decoded == client.chat().json()["usage"]["completion_tokens"]


def test_sampled_answers_are_n_sequences(client: Client) -> None:
    answer = client.chat(n=3, temperature=1.0).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "content", "reason"), [("there", "Hello ", "there"), (["xyz", "o t"], "Hell", "o t")])
def test_a_stop_string_ends_the_content(client: Client, stream: bool, stop: object, content: str, reason: str) -> None:
    reply = client.chat(stop=stop, stream=stream)
    if stream:
        found = join(reply)
        assert (found["content"].rstrip(), found["finish_reason"]) == (content.rstrip(), "stop")
        assert reply.events[-1]["choices"][0]["stop_reason"] == reason
        return
    choice = reply.json()["choices"][0]
    assert choice["message"]["content"] == content.rstrip()
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)


def test_a_stop_string_ends_the_reasoning_too(client: Client) -> None:
    choice = client.chat(stop="think").json()["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "I")
    kept = client.chat(stop="there", include_stop_str_in_output=True).json()["choices"][0]
    assert kept["message"]["content"] == "Hello there"


def test_log_probabilities_are_the_same_whole_and_streamed(client: Client) -> None:
    whole = client.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert join(client.chat(logprobs=True, top_logprobs=2, stream=True))["logprobs"] == whole
    assert b"".join(bytes(one["bytes"]) for one in whole).decode() == "I think.</think>Hello there, world!"
    assert all(one["logprob"] == -0.5 and len(one["top_logprobs"]) == 2 for one in whole)
    named = client.chat(logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True).json()["choices"][0]
    assert [one["token"] for one in named["logprobs"]["content"]] == [
        f"token_id:{token}" for token in named["token_ids"]
    ]
    assert [one["bytes"] for one in named["logprobs"]["content"]] == [one["bytes"] for one in whole]
    plain = client.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(one["top_logprobs"] == [] for one in plain)
    assert (
        client.chat(logprobs=True, top_logprobs=20).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"][-1][
            "logprob"
        ]
        == -9999.0
    )


def test_token_ids_come_back_if_they_are_wanted(client: Client) -> None:
    tokenizer = client.service.llm.tokenizer
    answer = client.chat(return_token_ids=True).json()
    assert tokenizer.decode(answer["choices"][0]["token_ids"]) == "I think.</think>Hello there, world!"
    events = client.chat(return_token_ids=True, stream=True).events
    assert events[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    ids = [token for event in events for token in event["choices"][0].get("token_ids", ())]
    assert ids == answer["choices"][0]["token_ids"]


def test_roles_and_forms_of_messages_reach_the_template(client: Client) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hidden",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "user", "content": "SAY </think>ok"},
    ]
    answer = client.call("/v1/chat/completions", ask() | {"messages": messages, "return_token_ids": True}).json()
    prompt = client.service.llm.tokenizer.decode(answer["prompt_token_ids"])
    assert " Be brief. " in prompt
    assert '<steptml:parameter name="city">Graz</steptml:parameter>' in prompt
    assert "<|BOT|>tool\n sun <|EOT|>" in prompt
    assert answer["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
def test_a_call_without_arguments_may_be_in_a_history(client: Client, arguments: object) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}]
    messages = [
        {"role": "user", "content": "What time is it?", "extra": "0"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "SAY </think>noon"},
    ]
    answer = client.call("/v1/chat/completions", ask() | {"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "noon"


def test_the_last_message_is_continued(client: Client) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "SAY and so on"}]
    body = ask() | {"messages": messages, "continue_final_message": True, "return_token_ids": True}
    answer = client.call("/v1/chat/completions", body).json()
    assert client.service.llm.tokenizer.decode(answer["prompt_token_ids"]).endswith("assistant\n SAY and so on")
    assert answer["choices"][0]["message"]["reasoning"] is None


def test_a_prompt_of_other_salt_shares_nothing(client: Client) -> None:
    text = "salt " * 100
    cached = [
        client.chat(text, cache_salt=salt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("a", "b", "a")
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] >= 64


def test_typed_marks_stay_text(client: Client) -> None:
    answer = client.chat("<think> <|EOT|> SAY </think>fine", return_token_ids=True).json()
    control = client.service.llm.tokenizer.control_tokens
    assert answer["prompt_token_ids"].count(control["<think>"]) == 1
    assert answer["choices"][0]["message"]["content"] == "fine"


def test_only_whole_characters_are_streamed(client: Client) -> None:
    text = "Grüße 你好 🎻 àé"
    reply = client.chat(f"SAY </think>{text}", stream=True)
    assert "\ufffd" not in reply.body.decode()
    assert join(reply)["content"] == text


def test_images_come_as_data_urls_in_their_places(client: Client) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url((30, 20)), "detail": "high"}},
        {"type": "text", "text": "SAY </think>a picture"},
        {"type": "image_url", "image_url": data_url((20, 30))},
    ]
    body = ask() | {"messages": [{"role": "user", "content": parts}], "return_token_ids": True}
    answer = client.call("/v1/chat/completions", body).json()
    model = client.service.llm
    place = model.tokenizer.control_tokens["<im_patch>"]
    assert answer["prompt_token_ids"].count(place) == 2 * model.config.image_token_len
    assert answer["choices"][0]["message"]["content"].startswith("a picture")
    assert client.metric("mm_cache_queries_total") == 2


@pytest.mark.parametrize(
    "url",
    ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "https://example.com/a.png", "data:,x", "x"],
)
def test_images_from_elsewhere_are_refused(client: Client, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    reply = client.call("/v1/chat/completions", ask() | {"messages": [{"role": "user", "content": [part]}]})
    assert (reply.status, reply.error["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [({"max_images": 1}, "at most 1 "), ({"max_image_pixels": 599}, "599"), ({"max_image_bytes": 60}, "60 ")],
)
def test_limits_of_images_are_settings(open_client: Open, setting: dict[str, int], allowed: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url((30, 20))}}] * 2
    with open_client(**setting) as client:
        reply = client.call("/v1/chat/completions", ask() | {"messages": [{"role": "user", "content": parts}]})
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert allowed in reply.error["message"]


def test_the_python_apis_forms_of_images_are_refused(client: Client) -> None:
    for part in ({"type": "image", "image": "/etc/passwd"}, {"type": "image", "path": "x"}, {"image": "x"}):
        reply = client.call("/v1/chat/completions", ask() | {"messages": [{"role": "user", "content": [part]}]})
        assert (reply.status, reply.error["param"]) == (400, "messages[0].content[0]"), reply.error


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_reasoning_parser_all_text_is_content(open_client: Open, stream: bool) -> None:
    with open_client(reasoning_parser="none") as client:
        reply = client.chat(stream=stream)
        if stream:
            assert join(reply)["content"] == REPLY
            return
        message = reply.json()["choices"][0]["message"]
        assert (message["content"], "reasoning" in message) == (REPLY, False)
        assert reply.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
        calls = client.chat(tools=TOOLS).json()["choices"][0]["message"]
        assert calls["content"] == REPLY


def test_what_ends_an_answer_can_be_chosen(client: Client) -> None:
    tokenizer = client.service.llm.tokenizer
    (comma,) = tokenizer.encode(",")
    choice = client.chat(stop_token_ids=[comma]).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hello there", comma)
    usage = client.chat(ignore_eos=True, max_tokens=30).json()["usage"]
    assert usage["completion_tokens"] == 30
    kept = client.chat("SAY </think>a<|BOT|>b", skip_special_tokens=False).json()["choices"][0]["message"]["content"]
    assert "<|BOT|>" in kept


def test_an_error_before_the_first_event_is_no_stream(client: Client) -> None:
    reply = client.chat(stream=True, n=0)
    assert (reply.status, reply.headers["content-type"]) == (400, "application/json")
    assert reply.error["param"] == "n"
