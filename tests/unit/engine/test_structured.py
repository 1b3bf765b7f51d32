"""Structured outputs, on the shipped model with llguidance."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import pytest

from step3_jax import LLM, SamplingParams, StructuredOutputsParams, resources
from step3_jax.engine.runner import Runner
from step3_jax.text.output_parser import THINK_END, parse_output
from step3_jax.text.tool_grammar import tool_grammar

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

FOLDER = resources.find("models/step3-tiny")
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 1, "maximum": 10_000_000},
        "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 3},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city", "days"],
            },
        },
    }
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# No reasoning, so that the structured output starts with the first token.
RAW = "The capital of France is"


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM(FOLDER, max_model_len=512, max_num_seqs=4)


def params(form: dict[str, object], max_tokens: int = 120, **values: object) -> SamplingParams:
    given = {"temperature": 0.0} | values
    return SamplingParams(max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form), **given)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_follows_its_schema_behind_the_reasoning(tiny: LLM, temperature: float) -> None:
    free = tiny.chat(QUESTION, SamplingParams(temperature=temperature, seed=3, max_tokens=120))[0].outputs[0]
    done = tiny.chat(QUESTION, params({"json": CITY}, temperature=temperature, seed=3))[0].outputs[0]
    end = tiny.tokenizer.control_id(THINK_END)
    if end in free.token_ids:
        place = free.token_ids.index(end) + 1
        assert done.token_ids[:place] == free.token_ids[:place], "reasoning is free"
    parsed = parse_output(done.text)
    assert done.finish_reason == "stop"
    assert parsed.reasoning
    jsonschema.validate(json.loads(parsed.content), CITY)


def test_regex_choice_and_grammar_hold_from_the_first_token_without_reasoning(tiny: LLM) -> None:
    forms: list[tuple[dict[str, object], str]] = [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["red", "green", "deep blue"]}, "red|green|deep blue"),
        ({"grammar": 'start: "(" start ")" | /[0-9]/'}, r"\(*[0-9]\)*"),
        ({"json_object": True}, r"(?s)\{.*\}"),
    ]
    for seed in range(4):
        outputs = tiny.generate([RAW] * len(forms), [params(form, 40, temperature=2.0, seed=seed) for form, _ in forms])
        for output, (form, pattern) in zip(outputs, forms, strict=True):
            text = output.outputs[0].text
            if output.outputs[0].finish_reason == "stop":
                assert re.fullmatch(pattern, text), (form, text)
            else:
                assert len(output.outputs[0].token_ids) == 40


def test_company_gets_exactly_what_it_gets_alone(tiny: LLM) -> None:
    free = [SamplingParams(temperature=1.0, seed=seed, max_tokens=40) for seed in range(2)]
    alone = [tiny.generate(RAW, one)[0].outputs[0] for one in free]
    mixed = tiny.generate([RAW] * 4, [*free, params({"json": CITY}), params({"regex": "[a-z]{30}"})])
    assert [output.outputs[0].token_ids for output in mixed[:2]] == [one.token_ids for one in alone]
    jsonschema.validate(json.loads(mixed[2].outputs[0].text), CITY)
    assert re.fullmatch("[a-z]{30}", mixed[3].outputs[0].text)


def test_a_stream_and_several_completions_have_the_form_too(tiny: LLM) -> None:
    pieces = list(tiny.generate(RAW, params({"json": CITY}), stream=True))
    assert "".join(piece.text for piece in pieces) == tiny.generate(RAW, params({"json": CITY}))[0].outputs[0].text
    several = tiny.generate(RAW, params({"json": CITY}, n=2, temperature=1.5, seed=1))[0].outputs
    for completion in several:
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), CITY)
    assert len({completion.text for completion in several}) > 1


def test_log_probabilities_are_the_model_s_own_and_cover_every_token(tiny: LLM) -> None:
    done = tiny.generate(RAW, params({"regex": "zebra [0-9]"}, logprobs=2))[0].outputs[0]
    assert done.text.startswith("zebra ")
    assert done.logprobs is not None
    assert len(done.logprobs) == len(done.token_ids)
    # What was forced is unlikely by itself.
    assert all(record[token].logprob < 0 for token, record in zip(done.token_ids, done.logprobs, strict=True))
    assert any(record[token].rank > 2 for token, record in zip(done.token_ids, done.logprobs, strict=True))


def test_a_required_call_is_made_and_is_valid(tiny: LLM) -> None:
    form = {"grammar": tool_grammar(TOOLS, is_parallel=False)}
    for seed in range(3):
        wanted = params(form, 200, temperature=1.0, seed=seed)
        done = tiny.chat([{"role": "user", "content": "How are you?"}], wanted, tools=TOOLS)[0].outputs[0]
        parsed = parse_output(done.text, TOOLS)
        assert done.finish_reason == "stop"
        assert (parsed.content, [call.name for call in parsed.tool_calls]) == ("", ["get_weather"])
        jsonschema.validate(json.loads(parsed.tool_calls[0].arguments), TOOLS[0]["function"]["parameters"])


def test_stop_strings_and_bounds_end_a_form_early(tiny: LLM) -> None:
    stopped = tiny.generate(RAW, params({"regex": "abcdefghijklmnop[0-9]"}, stop="h"))[0].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("abcdefg", "stop", "h")
    for most in range(1, 8):
        cut = tiny.generate(RAW, params({"regex": "abcdefghijklmnopqrstuvwxyz[0-9]"}, most))[0].outputs[0]
        assert (len(cut.token_ids), cut.finish_reason) == (most, "length")


def test_a_form_that_cannot_be_enforced_is_refused_and_others_are_answered(tiny: LLM) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs\.json/properties/a: Unimplemented keys"):
        tiny.generate(RAW, params({"json": {"properties": {"a": {"not": {}}}}}))
    outputs = tiny.generate([RAW] * 2, [params({"regex": "("}), params({"choice": ["yes"]})])
    assert "structured_outputs.regex" in str(outputs[0].error)
    assert outputs[1].outputs[0].text == "yes"


def test_a_model_without_a_tokenizer_refuses(runner: Runner) -> None:
    with pytest.raises(ValueError, match="structured_outputs need a tokenizer"):
        LLM.from_model(runner).generate([[1, 2, 3]], params({"regex": "a"}))


def test_without_the_library_one_line_says_what_to_install(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "step3_jax.sampling.grammar", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'step3-jax\[grammar\]'"):
        tiny.generate(RAW, params({"regex": "a"}))
