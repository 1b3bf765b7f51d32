"""Structured answers: the constraint is kept, and one that cannot be kept is refused, naming the field."""

from __future__ import annotations

import json
import threading

import pytest

from step3_jax.sampling.structured import GrammarBusyError
from step3_jax.server.service import NUM_GRAMMAR_THREADS
from tests.server.client import LIMIT_S, Client, Reply, ask
from tests.server.conftest import Open
from tests.server.test_chat import TOOLS, join

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

from step3_jax.sampling.grammar import Grammar, GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
ANSWER = '{"city":"Graz","days":3}'
CALL = (
    "<｜tool_calls_begin｜>\n<｜tool_call_begin｜>\nfunction<｜tool_sep｜>"
    '<steptml:invoke name="weather"><steptml:parameter name="city">Graz</steptml:parameter>'
    '<steptml:parameter name="days">3</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n<｜tool_calls_end｜>'
)


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"response_format": FORMAT}, ANSWER),
        ({"response_format": {"type": "json_object"}}, '{"a":[1]}'),
        ({"response_format": {"type": "text"}}, "anything"),
        ({"structured_outputs": {"json": SCHEMA}}, ANSWER),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ANSWER),
        ({"structured_outputs": {"regex": "[a-z]+[0-9]"}}, "abc7"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+'}}, "abbb"),
        ({"structured_outputs": {"json_object": True}}, "{}"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_matches_comes_whole_and_the_reasoning_is_free(
    client: Client, values: dict[str, object], answer: str, stream: bool
) -> None:
    reply = client.chat(f"SAY Any thought, {{.</think>{answer}", stream=stream, **values)
    assert reply.status == 200, reply.body
    if stream:
        found = join(reply)
        assert (found["content"], found["reasoning"]) == (answer, "Any thought, {.")
        return
    choice = reply.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
    assert choice["message"]["reasoning"] == "Any thought, {."


def test_a_tool_choice_of_null_is_none_at_all(client: Client) -> None:
    reply = client.chat(f"SAY </think>{ANSWER}", structured_outputs={"json": SCHEMA}, tool_choice=None)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER
    choice = client.chat(f"SAY </think>{CALL}", tools=TOOLS, tool_choice=None).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("values", [{"response_format": FORMAT}, {"structured_outputs": {"choice": ["yes", "no"]}}])
def test_an_answer_that_does_not_match_is_never_given(client: Client, values: dict[str, object]) -> None:
    # The model insists, so the request ends with nothing but its error.
    reply = client.chat("SAY fine.</think>Sure! Here", max_tokens=50, **values)
    assert reply.status == 500


def test_a_completion_is_held_to_its_form_from_the_start(client: Client) -> None:
    body = {"prompt": "SAY maybe", "temperature": 0, "structured_outputs": {"choice": ["maybe", "never"]}}
    assert client.call("/v1/completions", body).json()["choices"][0]["text"] == "maybe"


@pytest.mark.parametrize(
    "values",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"parallel_tool_calls": False},
    ],
)
def test_a_call_that_is_asked_for_is_made(client: Client, values: dict[str, object]) -> None:
    choice = client.chat(f"SAY Let me see.</think>{CALL}", tools=TOOLS, **values).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Graz", "days": 3}
    assert choice["finish_reason"] == "tool_calls"
    short = client.chat(f"SAY Let me see.</think>{CALL}", tools=TOOLS, max_tokens=1, **values).json()["choices"][0]
    assert (short["finish_reason"], "tool_calls" in short["message"], short["message"]["content"]) == (
        "length",
        False,
        None,
    )
    text = client.chat("SAY Let me see.</think>No call.", tools=TOOLS, **values)
    assert text.status == (200 if "tool_choice" not in values else 500)


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "none of them empty"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs", "grammar"),
        ({"structured_outputs": {"grammar": "root ::= nowhere"}}, "structured_outputs", "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"properties": {"a": "b"}}}}, "structured_outputs", "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs", "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not valid JSON"),
        ({"structured_outputs": {"json": {"type": "object", "not": {}}}}, "structured_outputs", "not"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}},
            "response_format",
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs", "give one of them"),
        ({"tool_choice": "required", "tools": TOOLS, "response_format": FORMAT}, "response_format", "give one of them"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "rain"}}, "tools": TOOLS},
            "tool_choice",
            "'rain'; the tools are weather",
        ),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos", "cannot be combined with"),
    ],
)
def test_what_cannot_be_held_to_is_refused(client: Client, values: dict[str, object], param: str, said: str) -> None:
    reply = client.chat(**values)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param, reply.error
    assert said in reply.error["message"], reply.error


def test_deep_and_large_schemas_are_refused(client: Client) -> None:
    deep: dict[str, object] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(2001)}}
    for schema, said in ((deep, "nested deeper"), (wide, "2,000 properties")):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        reply = client.chat(response_format=form)
        assert (reply.status, reply.error["param"]) == (400, "response_format")
        assert said in reply.error["message"], reply.error


def test_a_known_grammar_does_not_wait_for_slow_ones_and_a_new_one_is_asked_to_come_back(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"structured_outputs": {"choice": ["yes", "no"]}}
    compile_in_time, may_end = GrammarCompiler._compile_in_time, threading.Event()

    def compile_slowly(compiler: GrammarCompiler, kind: str, source: str) -> Grammar:
        if source.startswith("busy"):
            raise GrammarBusyError("structured_outputs: other grammars are still being compiled")
        assert not source.startswith("slow") or may_end.wait(LIMIT_S)
        return compile_in_time(compiler, kind, source)

    monkeypatch.setattr(GrammarCompiler, "_compile_in_time", compile_slowly)
    with open_client("</think>yes") as client:
        assert client.chat(**known).status == 200

        async def run() -> list[Reply]:
            slow = [
                client.start("/v1/chat/completions", ask(structured_outputs={"regex": f"slow{number}|yes"}))
                for number in range(NUM_GRAMMAR_THREADS)
            ]
            await client.wait_until(lambda: client.service.admission.num_requests == len(slow))
            assert (await client.start("/v1/chat/completions", ask(**known)).finish()).status == 200
            may_end.set()
            return [await call.finish() for call in slow]

        assert [reply.status for reply in client.run(run())] == [200] * NUM_GRAMMAR_THREADS
        reply = client.chat(structured_outputs={"regex": "busy"})
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "grammar_busy", "1")
        assert client.metric("admission_rejections_total", reason="grammar_busy") == 1


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/v1/chat/completions", {"response_format": FORMAT}),
        ("/v1/chat/completions", {"structured_outputs": {"json": SCHEMA}}),
        ("/v1/chat/completions", {"tools": TOOLS, "tool_choice": "required"}),
        ("/v1/completions", {"response_format": FORMAT}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}}),
    ],
)
def test_health_is_answered_while_a_schema_is_read(
    client: Client, path: str, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reading, may_go_on = threading.Event(), threading.Event()

    def check_slowly(schema: object, name: str) -> None:
        is_reading.set()
        assert threading.current_thread() is not threading.main_thread()
        assert may_go_on.wait(LIMIT_S)

    monkeypatch.setattr("step3_jax.sampling.structured.check_schema", check_slowly)
    monkeypatch.setattr("step3_jax.text.tool_grammar.check_schema", check_slowly)
    prompt = {"/v1/completions": {"prompt": "a"}, "/v1/responses": {"input": "a"}}.get(path, ask("a"))

    async def run() -> Reply:
        call = client.start(path, prompt | {"max_tokens": 1, "max_output_tokens": 16} | values)
        await client.wait_until(is_reading.is_set)
        assert (await client.start("/health").finish()).status == 200
        may_go_on.set()
        return await call.finish()

    # What the model would say is no such answer.
    assert client.run(run()).status in (200, 500)


def test_a_schema_is_refused_by_its_size_before_anything_else(client: Client) -> None:
    large = {"anyOf": [{"type": "foo" * 9, "items": [{}]}] * 10_000}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": large}}
    reply = client.chat(response_format=form)
    assert (reply.status, reply.error["param"]) == (400, "response_format")
    assert "response_format.json_schema.schema is larger than 256 KiB" in reply.error["message"]
    tools = [{"type": "function", "function": {"name": "a", "parameters": large}}]
    reply = client.chat(tools=tools, tool_choice="required")
    assert (reply.status, reply.error["param"]) == (400, "tool_choice")
    assert "larger than 256 KiB" in reply.error["message"]
