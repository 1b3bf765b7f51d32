"""Text, stop strings and ends of one completion, token by token."""

from __future__ import annotations

import pytest

from step3_jax.engine.completion import Completion
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.state import FULL, RUNNING, STOPPED
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

EOT = 257


def start(tokenizer: Tokenizer | None, **values: object) -> Completion:
    return Completion(Request(3, Prompt((1,)), SamplingParams(**values), 0), 1, tokenizer, (EOT,))


def test_half_a_character_waits_for_its_rest(tokenizer: Tokenizer) -> None:
    first, second, third = "€".encode()
    completion = start(tokenizer)
    assert completion.push([97, first], RUNNING).text == "a"
    assert completion.push([second], RUNNING).text == ""
    assert completion.push([third], RUNNING).text == "€"
    assert completion.push([first], FULL).text == "\ufffd"
    assert completion.output().text == "a€\ufffd"
    assert completion.output().finish_reason == "length"


@pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (2, 3, 1), (5, 1)])
def test_a_stop_string_is_found_across_pieces(tokenizer: Tokenizer, sizes: tuple[int, ...]) -> None:
    completion, ids, texts = start(tokenizer, stop="cde"), list(b"abcdef"), []
    for size in sizes:
        piece = completion.push(ids[:size], RUNNING)
        ids = ids[size:]
        texts.append(piece.text if piece else "")
    output = completion.output()
    assert "".join(texts) == output.text == "ab"
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (tuple(b"abcde"), "stop", "cde")
    assert completion.push(list(b"more"), FULL) is None
    assert completion.num_tokens == 5


def test_a_held_back_part_of_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="cde")
    assert completion.push(list(b"abcd"), RUNNING).text == "ab"
    assert completion.push([EOT], STOPPED).text == "cd"
    assert completion.output().text == "abcd"
    assert completion.output().stop_reason is None
    assert completion.num_tokens == 5


def test_a_stop_string_before_min_tokens_does_not_end(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="b", min_tokens=3)
    assert completion.push(list(b"abcdbz"), RUNNING).text == "abcd"
    assert completion.output().token_ids == tuple(b"abcdb")


def test_a_stop_string_and_the_end_in_one_piece_are_the_stop_string(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="b")
    piece = completion.push([97, 98, 99, EOT], STOPPED)
    assert (piece.text, piece.token_ids, piece.stop_reason) == ("a", (97, 98), "b")
    assert completion.num_tokens == 2


def test_special_tokens_are_text_only_if_asked_for(tokenizer: Tokenizer) -> None:
    assert start(tokenizer).push([97, 258], RUNNING).text == "a"
    assert start(tokenizer, skip_special_tokens=False).push([97, 258], RUNNING).text == "a<im_patch>"
    assert start(tokenizer, detokenize=False).push([97], RUNNING).text == ""


def test_a_piece_names_its_request_and_completion() -> None:
    piece = start(None).push([97], RUNNING)
    assert (piece.index, piece.completion, piece.text, piece.token_ids) == (3, 1, "", (97,))
    assert start(None).push([], RUNNING) is None
