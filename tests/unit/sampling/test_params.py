"""SamplingParams: defaults, ranges, and what a model's generation_config.json changes."""

from __future__ import annotations

import pytest

from step3_jax.sampling.params import SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.max_tokens, params.top_p, params.top_k) == (1, 1.0, 16, 1.0, 0)
    assert params.skip_special_tokens
    assert not params.ignore_eos
    assert params.seed is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [1]),
        ("seed", 1.5),
        ("seed", 2**64),
        ("ignore_eos", 1),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_edges_of_ranges_are_allowed() -> None:
    SamplingParams(
        temperature=0, top_p=1, min_p=1, top_k=-1, presence_penalty=-2, frequency_penalty=2, logprobs=0, max_tokens=None
    )
    SamplingParams(min_tokens=16, seed=-1, logit_bias={0: -100, 1: 100})


def test_one_stop_string_becomes_a_tuple() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_several_greedy_completions_are_refused() -> None:
    with pytest.raises(ValueError, match="n is 2 at temperature 0"):
        SamplingParams(n=2, temperature=0)


def test_stop_strings_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_generation_config_overrides_the_defaults() -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 99}
    params = SamplingParams.from_generation_config(values | {"bos_token_id": 0, "do_sample": True, "min_p": None})
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert (params.repetition_penalty, params.max_tokens, params.min_p) == (1.05, 99, 0.0)
    assert SamplingParams.from_generation_config({}) == SamplingParams()


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"generation_config.json: top_p"):
        SamplingParams.from_generation_config({"top_p": 2})


def test_a_seed_of_minus_one_is_none():
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2
    assert SamplingParams(seed=0).seed == 0


def test_what_stop_strings_wait_for_is_text() -> None:
    assert SamplingParams(stop="x", stop_after="</think>").stop_after == "</think>"
    with pytest.raises(ValueError, match="stop_after is None"):
        SamplingParams(stop="x", stop_after=None)  # type: ignore[arg-type]
