"""Models, versions, ids of requests, tokens, and the description of it all."""

from __future__ import annotations

import re

import jsonschema
import pytest

from step3_jax import __version__
from step3_jax.engine.output import OutputProcessor
from step3_jax.server.chat import ChatJob
from tests.server.client import Client, ask
from tests.server.conftest import Open


def test_models_are_listed_under_all_their_names(open_client: Open) -> None:
    with open_client(served_model_name=("first", "org/second")) as client:
        found = client.call("/v1/models").json()
        assert [card["id"] for card in found["data"]] == ["first", "org/second"]
        card = client.call("/v1/models/org/second").json()
        assert (card["id"], card["object"], card["owned_by"]) == ("org/second", "model", "step3")
        assert card["max_model_len"] == 2048
        assert client.call("/v1/models/third").error["code"] == "model_not_found"
        assert client.chat(model="org/second").json()["model"] == "org/second"
        assert client.chat().json()["model"] == "first"


def test_version(client: Client) -> None:
    assert client.call("/version").json() == {"version": __version__}


@pytest.mark.parametrize(("given", "is_kept"), [("abc-123", True), ("a" * 129, False), ("a b", False), ("ü", False)])
def test_a_request_keeps_its_id(client: Client, given: str, is_kept: bool) -> None:
    for path in ("/v1/models", "/nope"):
        found = client.call(path, headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given) is is_kept
        assert found


def test_a_request_is_one_line_of_the_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "step3_jax.server"):
        client.call("/v1/chat/completions", ask("my secret"), headers={"x-request-id": "abc-123"})
        client.call("/health")
        client.call("/x%0aforged\nline")
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if "abc-123" in line]
    assert "POST /v1/chat/completions 200" in line
    assert "prompt=" in line
    assert "generated=" in line
    assert "finish=stop" in line
    assert not any("\n" in line or "secret" in line or "/health" in line for line in lines)


def test_every_line_about_a_request_has_its_id(
    open_client: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    def send(client: Client, **values: object) -> None:
        client.call("/v1/chat/completions", ask(**values), headers={"x-request-id": "abc-123"})

    with caplog.at_level("INFO", "step3_jax.server"):
        with open_client() as client:
            client.executor.failure = RuntimeError("out of memory")
            send(client, frobnicate=1)
            with monkeypatch.context() as patch:
                patch.setattr(OutputProcessor, "push", crash)
                send(client)
            with monkeypatch.context() as patch:
                patch.setattr(ChatJob, "add", crash)
                send(client, stream=True)
                send(client)
        with open_client(request_timeout=0.05) as client:
            client.executor.gate.clear()
            send(client)
            client.executor.gate.set()
    lines = [record.getMessage() for record in caplog.records]
    for said in ("unknown field", "failed: ", "the text of", "in the stream", ": internal server error", "has taken"):
        assert any(said in line for line in lines), said
    assert [line for line in lines if "abc-123" not in line] == []


def test_prompts_are_logged_if_that_is_asked_for(open_client: Open, caplog: pytest.LogCaptureFixture) -> None:
    with open_client(log_prompts=True) as client, caplog.at_level("INFO", "step3_jax.server"):
        client.chat("not so secret")
    assert "not so secret" in caplog.text


def test_tokens_of_text_and_of_conversations(client: Client) -> None:
    tokenizer = client.service.llm.tokenizer
    found = client.call("/tokenize", {"prompt": "Hello there", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("Hello there", add_bos=True)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert "".join(found["token_strs"][1:]) == "Hello there"
    bare = client.call("/tokenize", {"prompt": "Hello there", "add_special_tokens": False}).json()
    assert bare["tokens"] == found["tokens"][1:]
    chat = client.call("/tokenize", {"messages": ask("Hi")["messages"]}).json()
    assert chat["tokens"] == client.chat("Hi", return_token_ids=True).json()["prompt_token_ids"]
    text = client.call("/detokenize", {"tokens": found["tokens"][1:]}).json()
    assert text == {"prompt": "Hello there"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_cannot_be_tokens_is_refused(client: Client, path: str, body: dict[str, object], param: str) -> None:
    reply = client.call(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_the_description_is_that_of_the_real_answers(client: Client) -> None:
    found = client.call("/openapi.json").json()
    assert client.call("/docs").status == 404
    paths = found["paths"]
    assert "/v1/chat/completions" in paths

    def schema_of(path: str, method: str, status: str, kind: str = "application/json") -> dict:
        content = paths[path][method]["responses"][status]["content"][kind]
        schema = content["schema"] if kind == "application/json" else content["x-event-schema"]
        return schema | {"components": found["components"]}

    jsonschema.validate(client.chat(logprobs=True).json(), schema_of("/v1/chat/completions", "post", "200"))
    event_schema = schema_of("/v1/chat/completions", "post", "200", "text/event-stream")
    for event in client.chat(stream=True, stream_options={"include_usage": True}).events:
        jsonschema.validate(event, event_schema)
    jsonschema.validate(client.chat(n=0).json(), schema_of("/v1/chat/completions", "post", "400"))
    completion = client.call("/v1/completions", {"prompt": "a", "logprobs": 2}).json()
    jsonschema.validate(completion, schema_of("/v1/completions", "post", "200"))
    for path in ("/v1/models", "/health", "/version"):
        jsonschema.validate(client.call(path).json(), schema_of(path, "get", "200"))
    request = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(ask(n=2, stop=["a"]), request | {"components": found["components"]})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"messages": "Hi"}, request | {"components": found["components"]})


def test_the_page_about_the_api_is_there_if_it_is_asked_for(open_client: Open) -> None:
    with open_client(docs=True, api_key=("k",)) as client:
        reply = client.call("/docs")
        page = reply.body.decode()
        assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "http://" not in page
        assert "https://" not in page, "it needs no other site"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        for path, operations in client.app.openapi()["paths"].items():
            for method in operations:
                assert f"<h2>{method.upper()} {path}</h2>" in page
        assert '<code>messages</code>: list of <a href="#ChatMessage">ChatMessage</a>, required' in page
        anchors = set(re.findall(r'<h2 id="(\w+)">', page))
        assert set(re.findall(r'href="#(\w+)"', page)) <= anchors


def test_defaults_come_from_the_model_unless_they_are_not_wanted(open_client: Open) -> None:
    stored = {"max_new_tokens": 2}
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    with open_client(stored=stored) as client:
        assert client.call("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 2
    with open_client(stored=stored, generation_config="none") as client:
        assert client.call("/v1/chat/completions", body).json()["usage"]["completion_tokens"] > 2


def test_the_chat_page_is_there_on_loopback_and_needs_no_key(open_client: Open) -> None:
    with open_client(api_key=("k",)) as client:
        page = client.call("/")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert client.call("/page/page.js").status == 200
        assert client.call("/page/nope.js").status == 404
        assert client.call("/page/../app.py").status == 401
    for values in ({"host": "0.0.0.0"}, {"ui": False}):
        with open_client(**values) as client:
            assert client.call("/").status == 404
    with open_client(host="0.0.0.0", ui=True) as client:
        assert client.call("/").status == 200
