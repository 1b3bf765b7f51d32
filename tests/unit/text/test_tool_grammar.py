"""The grammar of tool calls: what follows it is parsed into calls that are valid under the schemas."""

from __future__ import annotations

import pytest

from step3_jax import resources
from step3_jax.sampling.structured import StructuredOutputsParams
from step3_jax.text.output_parser import parse_output
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.text.tool_grammar import tool_grammar

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

from step3_jax.sampling.grammar import GrammarCompiler, GrammarError

FOLDER = resources.find("models/step3-tiny")
TRAIN = {
    "type": "object",
    "$defs": {"name": {"type": "string", "pattern": "^[A-Z]"}},
    "properties": {
        "origin": {"type": "string"},
        "to": {"$ref": "#/$defs/name"},
        "changes": {"type": "integer", "minimum": 0, "description": "How many."},
        "when": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "class": {"enum": ["first", "second", 3]},
        "pin": {"type": ["integer", "null"]},
        "due": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        "any": {},
    },
    "required": ["origin", "changes"],
}
TOOLS = [
    {"type": "function", "function": {"name": "find_train", "parameters": TRAIN}},
    {"type": "function", "function": {"name": "ping"}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    description = (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    return GrammarCompiler(description, vocab_size=4096, eos_ids=tokenizer.eos_ids)


@pytest.fixture
def follows(compiler: GrammarCompiler, tokenizer: Tokenizer):
    """Whether an output is complete under the grammar of `TOOLS`."""

    def check(text: str, **options: object) -> bool:
        grammar = compiler.compile(StructuredOutputsParams(grammar=tool_grammar(TOOLS, **options)))  # type: ignore[arg-type]
        matcher = grammar.begin()
        try:
            matcher.accept([*tokenizer.encode(text), *tokenizer.eos_ids])
        except GrammarError:
            return False
        return True

    return check


def call(name: str, **parameters: str) -> str:
    inner = "".join(f'<steptml:parameter name="{key}">{text}</steptml:parameter>' for key, text in parameters.items())
    head = f'<｜tool_call_begin｜>\nfunction<｜tool_sep｜><steptml:invoke name="{name}">'
    return f"{head}{inner}</steptml:invoke><｜tool_call_end｜>\n"


def block(*calls: str) -> str:
    return f"\n\n<｜tool_calls_begin｜>\n{''.join(calls)}<｜tool_calls_end｜>"


FULL = {
    "origin": "Gr<az</a>\n",
    "to": "Wien",
    "changes": "12",
    "when": "2026-01-31",
    "tags": '["a", "b"]',
    "class": "3",
    "pin": "null",
    "due": "a\nb",
    "any": "7",
}


def test_a_call_with_every_parameter_is_parsed_as_the_schema_says(follows) -> None:
    text = block(call("find_train", **FULL), call("ping"))
    assert follows(text)
    first, second = parse_output(text, TOOLS, starts_thinking=False).tool_calls
    assert first.arguments == (
        '{"origin": "Gr<az</a>\\n", "to": "Wien", "changes": 12, "when": "2026-01-31", "tags": ["a", "b"], '
        '"class": "3", "pin": null, "due": "a\\nb", "any": "7"}'.replace('"class": "3"', '"class": 3')
    )
    assert (second.name, second.arguments) == ("ping", "{}")


@pytest.mark.parametrize(
    "parameters",
    [
        {"origin": "a"},
        {"changes": "1", "origin": "a"},
        {"origin": "a", "changes": "-1"},
        {"origin": "a", "changes": "many"},
        {"origin": "a", "to": "wien", "changes": "1"},
        {"origin": "a", "changes": "1", "when": "2026-13-01"},
        {"origin": "a", "changes": "1", "tags": "[1]"},
        {"origin": "a", "changes": "1", "class": "third"},
        {"origin": "a", "changes": "1", "due": "long"},
        {"origin": "a", "changes": "1", "other": "b"},
        {"origin": "a</steptml:invoke>", "changes": "1"},
    ],
)
def test_a_call_that_the_schema_does_not_allow_cannot_be_made(parameters: dict[str, str], follows) -> None:
    assert not follows(block(call("find_train", **parameters)))
    assert follows(block(call("find_train", origin="a", changes="1")))


@pytest.mark.parametrize(
    ("options", "text", "is_right"),
    [
        ({}, "", False),
        ({}, "Hello", False),
        ({}, "Hello" + block(call("ping")), False),
        ({}, block(), False),
        ({}, block(call("ping"), call("ping")), True),
        ({"is_parallel": False}, block(call("ping")), True),
        ({"is_parallel": False}, block(call("ping"), call("ping")), False),
        ({"choice": "ping"}, block(call("ping")), True),
        ({"choice": "ping"}, block(call("find_train", origin="a", changes="1")), False),
        ({"is_free": True, "is_parallel": False}, "Hello <b>", True),
        ({"is_free": True, "is_parallel": False}, "Hello" + block(call("ping")), True),
        ({"is_free": True, "is_parallel": False}, "Hello" + block(call("ping"), call("ping")), False),
    ],
)
def test_which_calls_may_be_made_is_the_caller_s_choice(
    options: dict[str, object], text: str, is_right: bool, follows
) -> None:
    assert follows(text, **options) is is_right


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "x has no type, so not cannot be enforced"),
        ({"type": "string", "contains": 1}, "x/contains cannot be enforced for a string"),
        ({"type": "string", "format": "idn-email"}, "x/format is 'idn-email'; allowed: date"),
        ({"type": "strnig"}, "x/type is 'strnig'"),
        ({"anyOf": []}, "x/anyOf is"),
        ({"anyOf": [{}], "minLength": 1}, "x/minLength cannot be enforced together with anyOf"),
        ({"$ref": "#/$defs/none"}, r"x/\$ref is '#/\$defs/none', which is not the schema of a value"),
        ({"$ref": "#/properties/x"}, "which is not the schema of a value"),
        ({"enum": ["</steptml:parameter>"]}, "holds the end of a value"),
        ({"type": "string", "minLength": "1}"}, "x/minLength is '1}'"),
        (3, "x is 3; a schema is needed"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(schema, message: str) -> None:
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}]
    with pytest.raises(ValueError, match=rf"f\.parameters/properties/.*{message}"):
        tool_grammar(tools)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], None, "there are no tools"),
        (TOOLS, "pong", "tool_choice names 'pong'; the tools are find_train, ping"),
        ([{"name": 'a"b'}], None, "cannot be written in a tool call"),
        ([{"name": "a", "parameters": {"type": "array"}}], None, "object is needed"),
        ([{"name": "a", "parameters": {"required": ["b"]}}], None, "not one of the properties"),
        ([{"name": "a", "parameters": {"$defs": {"b": {"enum": [7] * 200_000}}}}], None, "larger than 256 KiB"),
        ([{"name": f"tool_{number}"} for number in range(40_000)], None, "larger than 256 KiB"),
        ([{"name": "a", "parameters": {"minProperties": 1}}], None, "a.parameters/minProperties cannot be enforced"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(tools, choice: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool_grammar(tools, choice=choice)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\d+$", "12", "a12"),
        (r"a/b", "xa/by", "ab"),
        (r"^a|b$", "a", "x"),
        (r"x\$", "ax$b", "ax"),
    ],
)
def test_patterns_are_searched_for(
    pattern: str, right: str, wrong: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "string", "pattern": pattern}}}}]
    grammar = compiler.compile(StructuredOutputsParams(grammar=tool_grammar(tools)))
    grammar.begin().accept(tokenizer.encode(block(call("f", x=right))))
    with pytest.raises(GrammarError):
        grammar.begin().accept(tokenizer.encode(block(call("f", x=wrong))))
