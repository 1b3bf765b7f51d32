"""Text of a growing sequence equals the text of the whole, and stop strings do not depend on its pieces."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step3_jax.text.detokenize import Detokenizer, StopStrings

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
TEXTS = st.text(alphabet="ab <>é你好世👩🚀\u200d🇫🇷�\n\x00", max_size=30)
CHUNK = st.integers(1, 4)


def _pieces(sequence, size):
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


@SHARED
@given(ids=st.lists(st.integers(0, 450), max_size=40), size=CHUNK, skip=st.booleans())
def test_any_ids_give_the_same_text_as_decode(tokenizer, ids, size, skip):
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(stream.push(piece) for piece in _pieces(ids, size))
    assert text + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


@SHARED
@given(text=TEXTS, size=CHUNK)
def test_only_complete_characters_come_out(tokenizer, text, size):
    stream = Detokenizer(tokenizer)
    emitted = ""
    for piece in _pieces(tokenizer.encode_user_text(text), size):
        emitted += stream.push(piece)
        assert text.startswith(emitted)
    assert emitted == text
    assert stream.finish() == ""


@SHARED
@given(text=TEXTS.filter(lambda text: "�" not in text), size=CHUNK)
def test_byte_fallback_vocabulary_gives_the_same_text_as_decode(fallback_tokenizer, text, size):
    ids = fallback_tokenizer.encode(text)
    expected = fallback_tokenizer.decode(ids)
    stream = Detokenizer(fallback_tokenizer)
    emitted = ""
    for piece in _pieces(ids, size):
        emitted += stream.push(piece)
        assert expected.startswith(emitted)
    assert emitted + stream.finish() == expected


def test_character_that_never_ends_becomes_a_replacement(tokenizer):
    first, *_ = tokenizer.encode_user_text("🚀")
    stream = Detokenizer(tokenizer)
    assert stream.push([first]) == ""
    assert stream.finish() == "�"


def test_pushing_nothing_gives_nothing(tokenizer):
    stream = Detokenizer(tokenizer)
    assert stream.push([]) == ""
    assert stream.finish() == ""


def test_stop_string_across_pieces_is_held_back():
    watch = StopStrings(["STOP"])
    assert watch.push("go S") == ("go ", False)
    assert watch.push("TO") == ("", False)
    assert watch.push("P and more") == ("", True)
    assert watch.matched == "STOP"
    assert watch.push("more") == ("", True)
    assert watch.flush() == ""


def test_partial_stop_string_is_given_back_at_the_end():
    watch = StopStrings("STOP")
    assert watch.push("go STO") == ("go ", False)
    assert watch.flush() == "STO"
    assert watch.matched is None


def test_included_stop_string_is_part_of_the_text():
    assert StopStrings(["b"], include=True).push("abc") == ("ab", True)


def test_no_stop_strings_hold_nothing_back():
    assert StopStrings([]).push("abc") == ("abc", False)


@pytest.mark.parametrize("stops", [[""], "", [3]])
def test_impossible_stop_strings_are_refused(stops):
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(stops)


@given(
    text=st.text(alphabet="ab", max_size=20),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    size=CHUNK,
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_pieces(text, stops, size, include):
    results = []
    for length in (1, size, max(len(text), 1)):
        watch = StopStrings(stops, include=include)
        emitted = "".join(watch.push(piece)[0] for piece in _pieces(text, length))
        results.append((emitted + watch.flush(), watch.matched))
    assert results[0] == results[1] == results[2]
    found, matched = results[0]
    assert (matched is not None) == any(stop in text for stop in stops)
    assert text.startswith(found if include or matched is None else found + matched)
    assert not any(stop in found[:-1] for stop in stops)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_stop_strings_count_only_behind_the_text_they_wait_for(size):
    text = "a stop in thought</think>an answer, stop, and more stop"
    stops = StopStrings("stop", after="</think>")
    shown = ""
    for start in range(0, len(text), size):
        piece, is_over = stops.push(text[start : start + size])
        shown += piece
        if is_over:
            break
    assert (shown + stops.flush(), stops.matched) == ("a stop in thought</think>an answer, ", "stop")


def test_a_stop_string_does_not_begin_in_the_text_that_is_waited_for():
    stops = StopStrings(">x", after="</think>")
    assert stops.push("</think>x") == ("</think>x", False)
    assert stops.push(">x") == ("", True)


def test_without_the_text_that_is_waited_for_nothing_stops():
    stops = StopStrings("stop", after="</think>")
    assert stops.push("stop </think") == ("stop </think", False)
    assert stops.flush() == ""
