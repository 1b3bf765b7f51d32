"""Text, stop strings and ends of one completion, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from step3_jax.engine.completion import Completion
from step3_jax.engine.request import FAILED, Prompt, Request, SequenceOutput, StreamPiece
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

EOT = 257
RUNNING, STOPPED, FULL = "", "stop", "length"


def start(tokenizer: Tokenizer | None, **values: object) -> Completion:
    return Completion(Request("r", Prompt((1,)), SamplingParams(**values), 0), 1, 3, tokenizer, (EOT,))


def push(completion: Completion, ids: Sequence[int], finish: str) -> StreamPiece | None:
    return completion.push(SequenceOutput("r", 1, tuple(ids), finish))


def test_half_a_character_waits_for_its_rest(tokenizer: Tokenizer) -> None:
    first, second, third = "€".encode()
    completion = start(tokenizer)
    assert push(completion, [97, first], RUNNING).text == "a"
    assert push(completion, [second], RUNNING).text == ""
    assert push(completion, [third], RUNNING).text == "€"
    assert push(completion, [first], FULL).text == "\ufffd"
    assert completion.output().text == "a€\ufffd"
    assert completion.output().finish_reason == "length"


@pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (2, 3, 1), (5, 1)])
def test_a_stop_string_is_found_across_pieces(tokenizer: Tokenizer, sizes: tuple[int, ...]) -> None:
    completion, ids, texts = start(tokenizer, stop="cde"), list(b"abcdef"), []
    for size in sizes:
        piece = push(completion, ids[:size], RUNNING)
        ids = ids[size:]
        texts.append(piece.text if piece else "")
    output = completion.output()
    assert "".join(texts) == output.text == "ab"
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (tuple(b"abcde"), "stop", "cde")
    assert push(completion, (b"more"), FULL) is None
    assert completion.num_tokens == 5


def test_a_held_back_part_of_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="cde")
    assert push(completion, (b"abcd"), RUNNING).text == "ab"
    assert push(completion, [EOT], STOPPED).text == "cd"
    assert completion.output().text == "abcd"
    assert completion.output().stop_reason is None
    assert completion.num_tokens == 5


def test_a_stop_string_before_min_tokens_does_not_end(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="b", min_tokens=3)
    assert push(completion, (b"abcdbz"), RUNNING).text == "abcd"
    assert completion.output().token_ids == tuple(b"abcdb")


def test_a_stop_string_and_the_end_in_one_piece_are_the_stop_string(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="b")
    piece = push(completion, [97, 98, 99, EOT], STOPPED)
    assert (piece.text, piece.token_ids, piece.stop_reason) == ("a", (97, 98), "b")
    assert completion.num_tokens == 2


def test_special_tokens_are_text_only_if_asked_for(tokenizer: Tokenizer) -> None:
    assert push(start(tokenizer), [97, 258], RUNNING).text == "a"
    assert push(start(tokenizer, skip_special_tokens=False), [97, 258], RUNNING).text == "a<im_patch>"
    assert push(start(tokenizer, detokenize=False), [97], RUNNING).text == ""


def test_a_piece_names_its_request_and_completion() -> None:
    piece = push(start(None), [97], RUNNING)
    assert (piece.index, piece.completion, piece.text, piece.token_ids) == (3, 1, "", (97,))
    assert piece.request_id == "r"
    assert push(start(None), [], RUNNING) is None


def test_a_stop_string_may_begin_in_the_last_of_min_tokens(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="bc", min_tokens=2)
    assert push(completion, b"abcd", RUNNING).text == "a"
    assert completion.output().token_ids == tuple(b"abc")


def test_a_shorter_stop_string_that_ended_before_min_tokens_does_not_end_later(tokenizer: Tokenizer) -> None:
    """The first one is held back as the start of the second."""
    completion = start(tokenizer, stop=["ab", "xabc"], min_tokens=3)
    assert push(completion, b"xab", RUNNING).text == ""
    assert push(completion, b"d", FULL).text == "xabd"
    assert completion.output().finish_reason == "length"


def test_a_failure_ends_with_its_reason_and_what_was_there(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop="cd")
    push(completion, b"abc", RUNNING)
    piece = completion.push(SequenceOutput("r", 1, (), FAILED, error="no memory"))
    assert (piece.text, piece.finish_reason, piece.error) == ("c", "error", "no memory")
    assert completion.output().text == "abc"
