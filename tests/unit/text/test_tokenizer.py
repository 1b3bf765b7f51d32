"""The checkpoint's tokenizer, and the path on which control tokens stay text."""

from __future__ import annotations

import json
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from step3_jax.text.tokenizer import Tokenizer

CONTROL_PIECES = (
    "<think>",
    "</think>",
    "<im_patch>",
    "<|EOT|>",
    "<｜tool_sep｜>",
    "<im",
    "_patch>",
    "a b",
    "你",
    "<",
)
TEXTS = st.lists(st.one_of(st.sampled_from(CONTROL_PIECES), st.text(max_size=5)), max_size=6).map("".join)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def test_control_tokens_are_whole_in_trusted_text(tokenizer):
    patch, think = tokenizer.control_id("<im_patch>"), tokenizer.control_id("<think>")
    ids = tokenizer.encode("a<im_patch><think>b")
    assert ids[1:3] == [patch, think]
    assert tokenizer.decode(ids) == "a<im_patch><think>b"


@SHARED
@given(text=TEXTS)
def test_user_text_never_gives_control_ids_and_survives(tokenizer, text):
    ids = tokenizer.encode_user_text(text)
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == text


@SHARED
@given(text=TEXTS)
def test_user_text_without_control_tokens_is_encoded_as_ever(tokenizer, text):
    if not tokenizer.find_control(text):
        assert tokenizer.encode_user_text(text) == tokenizer.encode(text)


@SHARED
@given(text=TEXTS)
def test_guarded_text_without_marks_is_encoded_as_ever(tokenizer, text):
    assert tokenizer.encode_guarded(text, "\U000f0000", "\U000f0001") == tokenizer.encode(text)


def test_guarded_stretch_stays_text_and_does_not_cut_words(tokenizer):
    ids = tokenizer.encode_guarded("<think>The qu[ick<think> fo]x thinks</think>", "[", "]")
    assert ids[0] == tokenizer.control_id("<think>")
    assert ids[-1] == tokenizer.control_id("</think>")
    assert ids[1:-1] == tokenizer.encode_user_text("The quick<think> fox thinks")


def test_control_token_cannot_form_across_a_mark(tokenizer):
    ids = tokenizer.encode_guarded("<im_[patch>]", "[", "]")
    assert tokenizer.control_id("<im_patch>") not in ids
    assert tokenizer.decode(ids) == "<im_patch>"


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_vocabulary_entries_of_control_tokens_are_not_matched_in_user_text(checkpoint, ignore_merges):
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    think = next(token["id"] for token in stored["added_tokens"] if token["content"] == "<think>")
    model = stored["model"]
    # A file may list control tokens in its vocabulary too, and even merges that build them.
    pairs = [["<", "t"], ["h", "i"], ["hi", "n"], ["hin", "k"], ["hink", ">"], ["<t", "hink>"]]
    for number, pair in enumerate(pairs[:-1]):
        model["vocab"].setdefault("".join(pair), 5000 + number)
    model["vocab"]["<think>"] = think
    model["merges"] = pairs + [pair for pair in model["merges"] if pair not in pairs]
    model["ignore_merges"] = ignore_merges
    stored["pre_tokenizer"]["use_regex"] = False
    tokenizer = Tokenizer(json.dumps(stored))
    assert think not in tokenizer.encode_user_text("<think>")
    assert tokenizer.decode(tokenizer.encode_user_text("<think>")) == "<think>"


def test_bos_is_added_only_on_request(tokenizer):
    assert tokenizer.encode("fox", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("fox")]


def test_special_tokens_are_skipped_but_think_is_kept(tokenizer):
    ids = tokenizer.encode("<think>fox<|EOT|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>fox"


def test_begin_and_end_tokens_follow_the_files_in_order(checkpoint, tmp_path):
    description = (checkpoint / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(description)
    bare = Tokenizer.load(tmp_path)
    assert bare.eos_ids == ()
    with pytest.raises(ValueError, match="give bos_id"):
        bare.encode("a", add_bos=True)

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|EOT|>"}}')
    assert Tokenizer.load(tmp_path).eos_ids == (bare.control_id("<|EOT|>"),)
    (tmp_path / "config.json").write_text('{"bos_token_id": 3, "eos_token_id": 4}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5]}')
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_ids) == (3, (5, 6))
    assert Tokenizer.load(tmp_path, bos_id=0, eos_ids=[7]).eos_ids == (7,)


def test_missing_control_tokens_are_named_when_needed(checkpoint, fallback_tokenizer):
    with pytest.raises(ValueError, match="'<think>'"):
        fallback_tokenizer.control_id("<think>")
    with pytest.raises(ValueError, match=r"<im_patch>, <im_start>.*does not support images"):
        fallback_tokenizer.image_token_ids()


def test_image_token_ids_are_found_by_name(tokenizer):
    ids = tokenizer.image_token_ids()
    assert ids.patch_newline == tokenizer.control_id("<patch_newline>")
    assert ids.im_patch == tokenizer.control_id("<im_patch>")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"added_tokens": [3], "model": {}}'])
def test_unusable_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a usable"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"])
def test_what_lies_in_place_of_the_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is (empty|a Git LFS pointer)"):
        Tokenizer.load(tmp_path)


def _with_added(checkpoint, words=(), flags=None, **changes):
    """The small tokenizer with further added tokens, and with other flags of its control tokens."""
    stored = json.loads((checkpoint / "tokenizer.json").read_text()) | changes
    for token in stored["added_tokens"]:
        token.update((flags or {}).get(token["content"], {}))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = max(token["id"] for token in stored["added_tokens"]) + 1
    stored["added_tokens"] += [{"id": first + n, **plain, **word} for n, word in enumerate(words)]
    description = json.dumps(stored)
    return Tokenizer(description), LibraryTokenizer.from_str(description)


WORDS = [
    {"content": "谐振腔"},
    {"content": "fox", "single_word": True},
    {"content": "brown", "lstrip": True, "rstrip": True},
    {"content": "Quick", "normalized": True},
    {"content": "éa"},
]
WORD_TEXTS = [
    "这个谐振腔有多大？",
    "foxes fox, fox",
    " a  brown  cat",
    "Quick quick QUICK",
    "éa é a",
    "谐谐振腔腔",
    "fox<brown",
]


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}, {"type": "NFKC"}])
@pytest.mark.parametrize("text", WORD_TEXTS)
def test_words_that_were_added_are_tokens_in_user_text_too(checkpoint, text, normalizer):
    tokenizer, library = _with_added(checkpoint, WORDS, normalizer=normalizer)
    assert tokenizer.encode_user_text(text) == library.encode(text, add_special_tokens=False).ids
    assert not {word["content"] for word in WORDS} & tokenizer.control_tokens.keys()


def test_added_words_beside_typed_control_tokens_are_still_tokens(checkpoint):
    tokenizer, library = _with_added(checkpoint, WORDS)
    word = library.token_to_id("谐振腔")
    ids = tokenizer.encode_guarded("<think>[<think>谐振腔</think>]谐振腔", "[", "]")
    assert ids.count(tokenizer.control_id("<think>")) == 1
    assert (ids.count(word), ids[-1]) == (2, word)
    assert tokenizer.decode(ids) == "<think><think>谐振腔</think>谐振腔"


@pytest.mark.parametrize("name", ["<new>", "important"])
def test_control_tokens_are_the_special_ones_and_those_written_as_marks(checkpoint, name):
    tokenizer, library = _with_added(checkpoint, [{"content": name, "special": name == "important"}])
    assert library.token_to_id(name) in library.encode(name).ids
    assert library.token_to_id(name) not in tokenizer.encode_user_text(f"an {name} word")


FLAGS = st.fixed_dictionaries({flag: st.booleans() for flag in ("lstrip", "rstrip", "single_word", "normalized")})
GUARDED = st.lists(
    st.tuples(
        st.booleans(), st.sampled_from(["<think>", "<|EOT|>", " ", "\n ", "fox", "quick", "谐振腔", "x", "é", "＜"])
    ),
    max_size=8,
)


@settings(SHARED, max_examples=60)
@given(think=FLAGS, end=FLAGS, word=FLAGS, pieces=GUARDED)
def test_flags_of_added_tokens_are_heeded(checkpoint, think, end, word, pieces):
    words = [{"content": "fox", **word}, {"content": "谐振腔"}]
    tokenizer, library = _with_added(checkpoint, words, {"<think>": think, "<|EOT|>": end}, normalizer={"type": "NFKC"})
    # Untrusted pieces that contain no control token leave the ids as the library gives them.
    pieces = [(is_trusted or piece.startswith("<"), piece) for is_trusted, piece in pieces]
    marked = "".join(piece if is_trusted else f"[{piece}]" for is_trusted, piece in pieces)
    expected = library.encode("".join(piece for _, piece in pieces), add_special_tokens=False).ids
    assert tokenizer.encode_guarded(marked, "[", "]") == expected


@settings(SHARED, max_examples=60)
@given(think=FLAGS, end=FLAGS, pieces=GUARDED)
def test_no_flag_lets_untrusted_text_make_or_unmake_a_control_token(checkpoint, think, end, pieces):
    flags = {"<think>": think | {"single_word": False}, "<|EOT|>": end | {"single_word": False}}
    tokenizer, _ = _with_added(checkpoint, [{"content": "x<"}], flags, normalizer={"type": "NFKC"})
    ids = tokenizer.encode_guarded("".join(p if t else f"[{p}]" for t, p in pieces), "[", "]")
    wanted = [tokenizer.control_id(p) for t, p in pieces if t and p in flags]
    # Trusted text may well break up one of its own.
    if not any(t and p.endswith("x") for t, p in pieces):
        assert [token for token in ids if token in tokenizer.control_tokens.values()] == wanted


def test_missing_file_and_unknown_token_are_named(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="checkpoint's folder"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="eos token is given as '<none>'"):
        Tokenizer((checkpoint / "tokenizer.json").read_text(), eos=["<none>"])


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("token", [-1, 2**40])
def test_impossible_ids_are_refused(tokenizer, token):
    with pytest.raises(ValueError, match="at least 0"):
        tokenizer.decode([token])
    with pytest.raises(ValueError, match="at least 0"):
        tokenizer.token_bytes(token)


def test_ids_without_a_token_give_no_text(tokenizer):
    beyond = tokenizer.num_ids + 5
    assert tokenizer.decode([beyond]) == ""
    assert tokenizer.token_bytes(beyond) == b""


def test_shipped_tokenizer_keeps_user_text(shipped):
    tokenizer = Tokenizer.load(shipped)
    text = "".join(tokenizer.control_tokens) + " 你好 👩‍🚀"
    ids = tokenizer.encode_user_text(text)
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_ids == (tokenizer.control_id("<|EOT|>"),)


def test_a_long_text_has_the_ids_of_the_library_and_comes_back(tokenizer):
    text = "Grüße, 你好! <think> {}\n" * 1000
    ids = tokenizer.encode(text)
    assert ids == LibraryTokenizer.from_str(tokenizer.description).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_user_text(text)) == text
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode(text + "\ud800")


def test_other_threads_run_while_a_long_text_is_encoded_and_decoded(tokenizer):
    interval = sys.getswitchinterval()
    count, has_ended = 0, threading.Event()
    seen: list[tuple[int, int]] = []

    def work() -> None:
        text, ids = "word " * 40_000, [5] * 100_000
        for call in (lambda: tokenizer.encode(text), lambda: tokenizer.decode(ids)):
            before = count
            call()
            seen.append((before, count))
        has_ended.set()

    # Threads now change only where one lets the others run by itself.
    sys.setswitchinterval(60)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not has_ended.is_set():
            count += 1
            time.sleep(0)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(after > before for before, after in seen), seen


def test_no_token_stands_for_more_characters_than_the_longest(tokenizer):
    texts = [tokenizer.decode([token]) for token in range(tokenizer.num_ids)]
    assert max(map(len, texts)) == tokenizer.longest
