"""vLLM's `speculative_config`: what is accepted, and what is refused with which message."""

from __future__ import annotations

import pytest

from step3_jax.sampling.speculation import Speculation


def test_vllms_names_are_taken_and_either_length_of_ngrams_stands_for_both() -> None:
    found = Speculation.of({"method": "ngram", "num_speculative_tokens": 4})
    assert (found.num_speculative_tokens, found.width) == (4, 5)
    assert found.prompt_lookup_min < found.prompt_lookup_max
    values = {"method": "ngram", "num_speculative_tokens": 3}
    assert Speculation.of(values | {"prompt_lookup_max": 4}).prompt_lookup_min == 4
    assert Speculation.of(values | {"prompt_lookup_min": 7}).prompt_lookup_max == 7
    both = Speculation.of(values | {"prompt_lookup_max": 4, "prompt_lookup_min": 1})
    assert both == Speculation(num_speculative_tokens=3, prompt_lookup_max=4, prompt_lookup_min=1)
    # It is part of a compiled program's key.
    assert hash(both) == hash(Speculation(num_speculative_tokens=3, prompt_lookup_max=4, prompt_lookup_min=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "speculative_config has no method; allowed: ngram"),
        ({"method": "eagle", "num_speculative_tokens": 4}, "speculative_config has method 'eagle'; allowed: ngram"),
        ({"method": "ngram"}, "speculative_config has no num_speculative_tokens: the tokens to guess at a time"),
        ({"num_speculative_tokens": 0}, "speculative_config: num_speculative_tokens is 0; a whole number from 1 to 16"),
        ({"num_speculative_tokens": 17}, "num_speculative_tokens is 17; a whole number from 1 to 16 is needed"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True; a whole number"),
        ({"num_speculative_tokens": "4"}, "num_speculative_tokens is '4'; a whole number"),
        ({"num_speculative_tokens": 4, "prompt_lookup_max": 0}, "prompt_lookup_max is 0; a whole number from 1 to 16"),
        (
            {"num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min is 3; it must be at most prompt_lookup_max, which is 2",
        ),
        ({"num_speculative_tokens": 4, "model": "x"}, "speculative_config has 'model'; allowed: method, num_spec"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, object], message: str) -> None:
    given = values if "method" in values or not values else {"method": "ngram"} | values
    with pytest.raises(ValueError, match=message):
        Speculation.of(given)
