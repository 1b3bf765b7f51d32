"""Values of a tool call's parameters, by the tool's schema."""

from __future__ import annotations

import json

import pytest

from step3_jax.text.tool_call import cast_arguments, cast_parameter, collect_schemas

TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        (" 4 ", {"type": "integer"}, 4),
        ("4.0", {"type": "integer"}, 4),
        ("4.5", {"type": "integer"}, "4.5"),
        ("1_000", {"type": "integer"}, "1_000"),
        ("9" * 5_000, {"type": "integer"}, "9" * 5_000),
        ("4", {"type": "number"}, 4),
        ("-.5e1", {"type": "number"}, -5.0),
        ("1e400", {"type": "number"}, "1e400"),
        ("nan", {"type": "number"}, "nan"),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        (" x\n", TEXT, " x\n"),
        ("4", TEXT, "4"),
        ("4", {}, "4"),
        ("4", None, "4"),
        ("4", {"type": ["string", "integer"]}, 4),
        ("007", {"type": "string"}, "007"),
        ("null", {"type": ["integer", "null"]}, None),
        ("None", {"anyOf": [TEXT, {"type": "null"}]}, None),
        ("null", {"type": "integer", "nullable": True}, None),
        ("null", {"type": "integer"}, "null"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("true", {"const": True}, True),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{'a': [1, None]}", {"type": "object"}, {"a": [1, None]}),
        ("[1, 2]", {"type": "object"}, "[1, 2]"),
        ("[NaN]", {"type": "array"}, "[NaN]"),
        ("{1, 2}", {"type": "object"}, "{1, 2}"),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ('["[[["]', {"type": "array"}, ["[[["]),
        ("7", {"$ref": "#/$defs/count"}, 7),
        ("7", {"$ref": "#/$defs/none"}, "7"),
        ("7", {"$ref": "#/$defs/loop"}, 7),
    ],
)
def test_a_value_is_of_a_type_that_the_schema_allows(text: str, schema: object, value: object) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/count"}] * 20}
    found = cast_parameter(text, schema, {"$defs": {"count": {"type": "integer"}, "loop": loop}})
    assert (found, type(found)) == (value, type(value))


def test_arguments_are_always_json_that_can_be_sent() -> None:
    schema = {"properties": {"list": {"type": "array"}, "text": TEXT}}
    encoded = cast_arguments({"list": '["\\ud800", "é"]', "text": '"\n'}, schema)
    assert json.loads(encoded.encode("utf-8")) == {"list": ["\ud800", "é"], "text": '"\n'}
    assert cast_arguments({"text": "é"}, schema) == '{"text": "é"}'
    assert cast_arguments({}, {}) == "{}"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "['" + "[" * 5_000])
def test_deep_nesting_stays_text(text: str) -> None:
    assert cast_parameter(text, {"type": ["array", "object"]}, {}) == text


def test_schemas_are_found_in_both_forms_of_tools() -> None:
    schema = {"type": "object"}
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": schema}},
        {"type": "function", "name": "b", "parameters": schema},
        {"type": "function", "function": {"name": "c"}},
        {"type": "web_search"},
    ]
    assert collect_schemas(tools) == {"a": schema, "b": schema, "c": {}}
