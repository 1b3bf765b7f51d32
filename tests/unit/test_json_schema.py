"""Which JSON schemas are refused before anything is compiled."""

from __future__ import annotations

import pytest

from step3_jax.json_schema import check_schema, subschemas


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
