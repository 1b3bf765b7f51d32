"""Which JSON schemas are refused before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from step3_jax.json_schema import check_schema, is_larger, subschemas


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (nested(33), "nested deeper than 32"),
        ({"properties": {str(number): {} for number in range(2001)}}, "more than 2,000 properties"),
        ({"anyOf": [{"$ref": "http://a/b"}]}, r"s/anyOf/0/\$ref is 'http://a/b'; only places in the schema itself"),
        ({"properties": {"a": {"items": [{}]}}}, "s/properties/a/items is a list"),
        ({"additionalItems": False}, "s/additionalItems is of an older draft"),
        ({"x-guidance": {"lenient": True}}, "s/x-guidance changes how strictly"),
        ({"minLength": "x"}, "s/minLength is 'x'; a whole number"),
        ({"maxItems": 1.5}, "s/maxItems is 1.5"),
        ({"exclusiveMinimum": True}, "s/exclusiveMinimum is True; a number"),
        ({1: {}}, "the key 1"),
    ],
)
def test_what_would_be_enforced_in_part_alone_is_refused_with_its_place(schema, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schema(schema, "s")


def test_names_of_properties_and_values_are_no_keywords() -> None:
    check_schema(nested(32), "s")
    check_schema({"properties": {"minLength": {"const": {"$ref": "http://a"}}, "x-guidance": {}}}, "s")


def test_places_are_json_pointers() -> None:
    schema = {"properties": {"a": {"type": "string"}}, "anyOf": [{}, True], "items": {"x": 1}, "enum": [{}], "not": 3}
    assert dict(subschemas(schema)) == {"/properties/a": {"type": "string"}, "/anyOf/0": {}, "/items": {"x": 1}}


@pytest.mark.parametrize(
    "value", [{}, [], "", 7, None, {"a": [1, 2, {"b": "c"}], "d": {}}, ["xy"] * 9, nested(9), {"é": [None, True, 1.5]}]
)
def test_a_value_is_larger_than_less_than_its_text_at_most(value: object) -> None:
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    assert not is_larger(value, size)
    assert is_larger(value, 0)


def test_what_does_not_count_is_text_alone() -> None:
    notes = {"properties": {"a": {"description": "x" * 1000}}}
    assert is_larger(notes, 500)
    assert not is_larger(notes, 500, ignored=frozenset(("description",)))
    schema = {"properties": {"description": {"enum": ["x" * 1000]}}}
    assert is_larger(schema, 500, ignored=frozenset(("description",)))


def test_no_more_of_a_large_value_is_looked_at_than_its_limit() -> None:
    num_seen = 0

    class Node(dict):
        def __iter__(self) -> Iterator[str]:
            nonlocal num_seen
            num_seen += 1
            return super().__iter__()

    wide = {"anyOf": [Node(type="string") for _ in range(100_000)]}
    assert is_larger(wide, 1000)
    assert num_seen == 0, "the list alone is too long"
    many = {"allOf": [{"anyOf": [Node(type="string") for _ in range(10)]} for _ in range(900)]}
    assert is_larger(many, 1000)
    assert num_seen < 100
