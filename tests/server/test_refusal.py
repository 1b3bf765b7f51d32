"""A mistake in a request is answered with 400, in one format, naming the field, the value and what is allowed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading

import pytest
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from step3_jax.server import body, media, prompt
from step3_jax.server.app import build_app
from step3_jax.server.body import MAX_DEPTH, read_body
from step3_jax.server.error import ApiError
from step3_jax.server.protocol.chat import ChatCompletionRequest, ChatMessage
from step3_jax.server.protocol.completion import CompletionRequest
from step3_jax.server.protocol.response import ResponseRequest
from step3_jax.server.tokenize import MAX_CHARACTERS
from step3_jax.text.tokenizer import Tokenizer
from tests.server.client import Client, Reply, ask, opened
from tests.server.conftest import Open
from tests.server.test_chat import TOOLS, data_url


def check_form(reply: Reply, status: int) -> dict:
    assert reply.status == status, reply.body
    assert set(reply.json()) == {"error"}
    error = reply.error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 1024
    assert "Traceback" not in error["message"]
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"messages": None}, "messages", "is None"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user"}]}, "messages", "no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]", "'image_url'"),
        ({"temperature": -1}, "temperature", "-1.0; a number at least 0"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"min_p": 2}, "min_p", "from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
        ({"n": 0}, "n", "from 1 to 16"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"n": 2.5}, "n", "2.5"),
        ({"best_of": 2}, "best_of", "only n"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"seed": "7"}, "seed", "'7'"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "at most max_tokens"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": "x" * 257}, "stop", "257 characters"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
        ({"stop_token_ids": list(range(64))}, "stop_token_ids", "64 ids; at most 63"),
        (
            {"logit_bias": {"a": 1, "5": 1, "99999": 1}},
            "logit_bias",
            "'a', '99999'; token ids are needed, from 0 to 4095",
        ),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
        ({"tool_choice": "some"}, "tool_choice", "'some'"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs"),
        ({"guided_grammar": "a"}, "guided_grammar", "structured_outputs"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids", "structured_outputs"),
        ({"bad_words": ["no"]}, "bad_words", "logit_bias of -100"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "a template is code"),
        ({"echo": True}, "echo", "in front of its continuation"),
        ({"logits_processors": ["a.b"]}, "logits_processors", "structured_outputs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "/v1/completions"),
        ({"thinking_token_budget": 0}, "thinking_token_budget", "max_tokens"),
        ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens", "send less"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        (
            {"chat_template_kwargs": {"check_rendered": 1}},
            "chat_template_kwargs",
            "check_rendered, which cannot be set",
        ),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "'x'"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice", "'required'"),
        ({"structured_outputs": {"regex": {"1": "a"}}}, "structured_outputs.regex", "string"),
        ({"stream_options": {"include_usage": None}}, "stream_options", "set stream to true"),
        ({"stop_token_ids": [4096]}, "stop_token_ids", "4096"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages, which cannot be set"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "false"),
        ({"continue_final_message": True}, "messages", "assistant's"),
    ],
)
def test_a_wrong_field_is_named(client: Client, values: dict[str, object], param: str, said: str) -> None:
    error = check_form(client.call("/v1/chat/completions", ask() | values), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
    assert said in error["message"], error


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "allowed_token_ids": [5]}),
        ("/v1/completions", {"prompt": "a", "bad_words": ["no"]}),
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1}),
        ("/v1/responses", {"input": "a", "guided_json": {}}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "b"}),
    ],
)
def test_what_would_change_the_answer_is_ignored_by_no_endpoint(
    client: Client, path: str, body: dict[str, object]
) -> None:
    assert check_form(client.call(path, body), 400)["param"] == list(body)[-1]
    kept = {"bad_words": [], "allowed_token_ids": None, "echo": False, "prompt_logprobs": False}
    assert client.call("/v1/completions", {"prompt": "SAY a"} | kept).status == 200
    assert client.chat(**kept).status == 200


def test_a_prompt_that_is_too_long_is_told_with_all_numbers(client: Client) -> None:
    error = check_form(client.chat(max_tokens=2048), 400)
    assert error["code"] == "context_length_exceeded"
    assert "2048 more are asked for" in error["message"]
    assert "max_model_len = 2048" in error["message"]
    assert "lower max_tokens" in error["message"]
    assert "lower max_completion_tokens" in client.chat(max_completion_tokens=2048).error["message"]
    error = check_form(client.chat("long " * 3000), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert client.chat("SAY </think>" + "w " * 900).json()["choices"][0]["finish_reason"] == "stop", "what is left"


def test_another_models_name_is_404(client: Client) -> None:
    error = check_form(client.chat(model="gpt-9"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "toy" in error["message"]
    assert client.chat(model="").status == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "a JSON object is needed"),
        (b'"text"', "a JSON object is needed"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested"),
        (b"[" * 30_000, "nested"),
        (b'{"a":' * 30_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" + b"[]," * 2**15 + b"[]]", "32,770 lists and objects; at most 32,768 are allowed"),
        (b"[" + b"1," * (2**19 + 1) + b"1]", "524,289 values; at most 524,288 are allowed"),
        (b"{" + b'"a":1,' * (2**16 + 1) + b'"a":1}', "65,538 names; at most 65,536 are allowed"),
        (b"[" + b'"",' * 2**21 + b'""]', "2,097,152 values; at most 524,288 are allowed"),
    ],
)
def test_a_body_that_is_no_plain_json_is_refused(client: Client, body: bytes, said: str) -> None:
    error = check_form(client.call("/v1/chat/completions", body), 400)
    assert said in error["message"]


def test_what_is_nested_as_deep_as_allowed_is_read(client: Client) -> None:
    inner: object = 1
    for _ in range(MAX_DEPTH - 1):
        inner = [inner]
    assert client.chat(unknown=inner).status == 200


def test_an_unknown_field_is_ignored_and_logged_once(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "step3_jax.server"):
        assert client.chat(frobnicate=1).status == 200
        assert client.chat(frobnicate=1).status == 200
    assert sum("frobnicate" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("value", [None])
def test_null_is_not_given(client: Client, value: None) -> None:
    fields = (
        "n",
        "stop",
        "max_tokens",
        "tools",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "seed",
        "user",
    )
    assert client.chat(**dict.fromkeys(fields, value)).status == 200


def test_the_size_of_a_body_is_counted_while_it_arrives(open_client: Open) -> None:
    with open_client(max_body_bytes=2000) as client:
        long = json.dumps(ask("x" * 3000)).encode()
        error = check_form(client.call("/v1/chat/completions", long, headers={"content-length": str(len(long))}), 413)
        assert "--max-body-bytes" in error["message"]
        pieces = [long[start : start + 100] for start in range(0, len(long), 100)]
        check_form(client.call("/v1/chat/completions", long, pieces=pieces), 413)
        check_form(client.call("/v1/chat/completions", long, headers={"content-length": "5"}), 413)
        assert client.chat().status == 200


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_another_content_type_is_415(client: Client, kind: str) -> None:
    check_form(client.call("/v1/chat/completions", b"{}", headers={"content-type": kind}), 415)
    fine = client.call("/v1/chat/completions", ask(), headers={"content-type": "application/json; charset=utf-8"})
    assert fine.status == 200


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/chat/completions", "GET"), ("/v1/models", "DELETE"), ("/health", "PUT")]
)
def test_another_method_is_405_with_those_that_are_allowed(client: Client, path: str, method: str) -> None:
    reply = client.call(path, method=method)
    check_form(reply, 405)
    assert reply.headers["allow"] in ("GET", "POST", "GET, HEAD")


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/messages", "/v1/embeddings", "/invocations", "/abort_requests", "//v1/models"]
)
def test_what_is_not_there_is_404(client: Client, path: str) -> None:
    check_form(client.call(path), 404)


def test_an_unexpected_mistake_is_500_in_the_same_form(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(client.service.llm.prompts, "from_chat", fail)
    error = check_form(client.chat(), 500)
    assert "secret" not in error["message"]
    assert "secret" in caplog.text


def test_before_the_model_is_there_requests_are_503() -> None:
    with opened(build_app(), None) as client:
        reply = client.chat()
        assert check_form(reply, 503)["code"] == "not_ready"
        assert reply.headers["retry-after"] == "1"
        check_form(client.call("/v1/models"), 503)


def test_a_body_that_takes_too_long_is_408() -> None:
    async def receive() -> dict:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            await read_body(Request(scope, receive), ChatMessage, max_bytes=10**6, pool=pool, arrival_s=0.05)

    with pytest.raises(ApiError) as refused:
        asyncio.run(run())
    assert (refused.value.status, refused.value.headers["Connection"]) == (408, "close")


@pytest.mark.parametrize(
    ("path", "name", "values"),
    [
        ("/v1/chat/completions", "messages", ask("long " * 100_000)),
        ("/v1/completions", "prompt", {"prompt": "long " * 100_000}),
        ("/v1/responses", "input", {"input": "long " * 100_000}),
        ("/tokenize", "messages", {"messages": ask("long " * 100_000)["messages"]}),
    ],
)
def test_a_text_that_cannot_fit_is_not_encoded(
    client: Client, monkeypatch: pytest.MonkeyPatch, path: str, name: str, values: dict[str, object]
) -> None:
    monkeypatch.setattr(Tokenizer, "_run", None)
    error = check_form(client.call(path, values), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", name)
    assert "characters, at least" in error["message"]
    assert "max_model_len = 2048" in error["message"]


def test_a_text_to_tokenize_has_a_limit(client: Client) -> None:
    error = check_form(client.call("/tokenize", {"prompt": "a" * (MAX_CHARACTERS + 1)}), 400)
    assert error["param"] == "prompt"
    assert "1048577 characters; at most 1048576" in error["message"]


@pytest.mark.parametrize("text", ["{" * 40_000, '\\"[' * 40_000, ',:"' * 200_000])
def test_marks_inside_a_text_are_not_counted(client: Client, text: str) -> None:
    found = client.call("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert client.call("/detokenize", {"tokens": found.json()["tokens"]}).json()["prompt"] == text


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * 1000}),
        (CompletionRequest, {"prompt": ["a", 1] * 1000}),
        (ChatCompletionRequest, {"messages": [{}] * 1000}),
        (ChatCompletionRequest, {"messages": [], "stop": [1] * 1000}),
        (ChatCompletionRequest, {"messages": [], "logit_bias": {str(key): "x" for key in range(2000)}}),
        (ResponseRequest, {"input": [{}] * 1000, "metadata": {str(key): 1 for key in range(2000)}}),
    ],
)
def test_the_first_wrong_item_ends_the_check(model: type[BaseModel], body: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 10


def test_large_bodies_are_read_in_threads(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, str] = {}

    def note(place: object, name: str) -> None:
        original = getattr(place, name)

        def call(*given: object, **options: object) -> object:
            threads[name] = threading.current_thread().name
            return original(*given, **options)

        monkeypatch.setattr(place, name, call)

    note(body, "parse_json")
    note(prompt, "read_messages")
    note(media, "collect_images")
    note(media, "replace_images")
    parts = [{"type": "text", "text": "a"}] * 1500 + [{"type": "image_url", "image_url": {"url": data_url((8, 8))}}]
    assert client.call("/v1/chat/completions", ask() | {"messages": [{"role": "user", "content": parts}]}).status == 200
    assert len(threads) == 4
    assert {name.partition("_")[0] for name in threads.values()} == {"step3-request"}
