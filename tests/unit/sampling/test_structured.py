"""Which structured outputs can be requested."""

from __future__ import annotations

import json

import pytest

from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.structured import StructuredOutputsParams


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"json": {"type": "integer"}}, "json", '{"type": "integer"}'),
        ({"json": '{"type":"integer"}'}, "json", '{"type": "integer"}'),
        ({"json": {}}, "json", '{"type": "object"}'),
        ({"json": True}, "json", '{"type": "object"}'),
        ({"json_object": True, "json": None}, "json", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["é", "b"]}, "choice", '["é", "b"]'),
        ({"grammar": 'start: "a"', "json": False}, "grammar", 'start: "a"'),
    ],
)
def test_each_form_has_a_kind_and_a_text(fields: dict[str, object], kind: str, source: str) -> None:
    form = StructuredOutputsParams(**fields)
    assert (form.kind, form.source) == (kind, source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has nothing; exactly one of json, regex, choice, grammar, json_object"),
        ({"json_object": False}, "has nothing"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice; exactly one"),
        ({"json": "{"}, "is not valid JSON"),
        ({"json": [1]}, "a JSON schema, which is an object, is needed"),
        ({"json": {"const": float("nan")}}, "is not JSON"),
        ({"json": {"const": object()}}, "is not JSON"),
        ({"json": {"items": [{}]}}, "structured_outputs.json/items is a list"),
        ({"json": "[" * 300_000}, "larger than 256 KiB"),
        ({"json": {"anyOf": [{"type": "foo", "items": [{}]}] * 20_000}}, "json is larger than 256 KiB"),
        ({"choice": ["a"] * 100_000}, "choice is larger than 256 KiB"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 3}, "regex is 3; text"),
        ({"regex": "a" * 300_000}, "regex is larger than 256 KiB"),
        ({"choice": []}, "a list of texts"),
        ({"choice": "ab"}, "a list of texts"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"json_object": 3}, "json_object is 3"),
    ],
)
def test_other_forms_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


def test_a_schema_that_the_caller_changes_later_stays_as_it_was() -> None:
    schema: dict[str, object] = {"type": "integer"}
    form = StructuredOutputsParams(json=schema)
    schema["type"] = "string"
    assert json.loads(form.source) == {"type": "integer"}


def test_sampling_parameters_take_a_form_and_no_ignore_eos_beside_it() -> None:
    form = StructuredOutputsParams(regex="a")
    assert SamplingParams(structured_outputs=form).structured_outputs is form
    with pytest.raises(ValueError, match="ignore_eos cannot be combined with structured_outputs"):
        SamplingParams(structured_outputs=form, ignore_eos=True)
    with pytest.raises(ValueError, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
