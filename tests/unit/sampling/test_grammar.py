"""Grammars of the shipped tokenizer, compiled and followed."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

from step3_jax import resources
from step3_jax.sampling.structured import GrammarBusyError
from step3_jax.sampling.structured import StructuredOutputsParams as Form
from step3_jax.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

from step3_jax.sampling.grammar import MAX_COMPILING, Grammar, GrammarCompiler, GrammarError, GrammarMatcher

VOCAB_SIZE = 4096
FOLDER = resources.find("models/step3-tiny")
DESCRIPTION = (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(DESCRIPTION, vocab_size=VOCAB_SIZE, eos_ids=tokenizer.eos_ids)


def allowed(matcher: GrammarMatcher) -> set[int]:
    mask = np.zeros((VOCAB_SIZE // 32,), np.int32)
    matcher.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def matches(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    matcher = grammar.begin()
    try:
        matcher.accept(tokenizer.encode(text))
    except GrammarError:
        return False
    return set(tokenizer.eos_ids) <= allowed(matcher)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (Form(json=CITY), '{"city": "Graz"}', '{"town": "Graz"}'),
        (Form(json=CITY), '{ "city":"Gr\\"az é" }', '{"city": "Graz"'),
        (Form(json=CITY), '{"city": "Graz"}', '{"city":  "Graz"}'),
        (Form(json_object=True), '{"a": [1, {"b": null}]}', "[1]"),
        (Form(regex="[0-9]{2}-(a|b)+"), "12-aba", "12-"),
        (Form(regex="^abc$"), "abc", "abcd"),
        (Form(choice=["yes", 'no "thanks"\n']), 'no "thanks"\n', "ye"),
        (Form(grammar='start: "a" start "b" | "c"'), "aacbb", "aacb"),
        (Form(grammar='root ::= "a" [0-9]+'), "a17", "b17"),
    ],
)
def test_outputs_have_the_form_that_was_asked_for(
    form: Form, right: str, wrong: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compile(form)
    assert matches(grammar, tokenizer, right)
    assert not matches(grammar, tokenizer, wrong)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            Form(json={"properties": {"a": {"items": {"not": {}}}}}),
            r'json/properties/a/items: Unimplemented keys: \["not"\]',
        ),
        (
            Form(json={"$defs": {"n": {"format": "x", "type": "string"}}, "$ref": "#/$defs/n"}),
            r"json/\$defs/n: Unknown format: x",
        ),
        (Form(json={"oneOf": [{"type": "string"}, {"pattern": "a"}]}), "json: oneOf constraints are not supported"),
        (Form(json={"type": "object", "properties": {"a": {"type": "foo"}}}), "json/properties/a: Invalid type: foo"),
        (Form(json={"$ref": "#/$defs/none"}), "Pointer '/\\$defs/none' does not exist"),
        (Form(json={"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable schema"),
        (Form(regex="["), "regex: .*unclosed character class"),
        (Form(regex="(?=a)b"), "look-around"),
        (Form(regex="\ud800"), "surrogates"),
        (Form(grammar='start: "a"\n  | b'), "grammar: .*unknown name"),
        (Form(grammar="start: <nope>"), "unknown special token"),
        (Form(grammar='start: a\na: %json {"not": {}}'), "line 2, .*Unimplemented keys"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(
    form: Form, message: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError, match=rf"structured_outputs\..*{message}") as caught:
        compiler.compile(form)
    assert len(str(caught.value)) < 450
    assert "\n" not in str(caught.value)


def test_only_end_tokens_are_allowed_once_nothing_can_follow(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Form(choice=["yes"])).begin()
    assert matcher.is_finished is False
    matcher.accept(tokenizer.encode("yes"))
    assert matcher.is_finished is True
    assert allowed(matcher) == set(tokenizer.eos_ids)


def test_forced_tokens_are_those_of_the_tokenizer(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Form(regex="The name is [a-z]")).begin()
    forced = matcher.find_forced()
    assert "The name is ".startswith(tokenizer.decode(forced))
    assert len(tokenizer.decode(forced)) > 8
    assert matcher.find_forced() == forced, "looking does not accept"
    matcher.accept(forced)
    assert matcher.find_forced() == []


def test_control_tokens_are_no_part_of_a_string(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Form(json={"type": "string"})).begin()
    matcher.accept(tokenizer.encode('"a'))
    assert not allowed(matcher) & set(tokenizer.control_tokens.values())


def test_matchers_of_one_grammar_do_not_share_their_state(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    form = Form(choice=["ab", "cd"])
    assert compiler.compile(form) is compiler.compile(form)
    first, second = compiler.compile(form).begin(), compiler.compile(form).begin()
    first.accept(tokenizer.encode("ab"))
    second.accept(tokenizer.encode("cd"))
    with pytest.raises(GrammarError, match="parser stopped"):
        first.accept(tokenizer.encode("a"))
    assert second.is_finished


def test_a_deadline_ends_the_wait(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(DESCRIPTION, vocab_size=VOCAB_SIZE, eos_ids=tokenizer.eos_ids, deadline_s=0.02)
    may_end = threading.Event()
    monkeypatch.setattr(compiler, "_compile_now", lambda kind, source: may_end.wait(30))
    with pytest.raises(GrammarError, match=r"regex takes longer than 0.02 s"):
        compiler.compile(Form(regex="a"))
    may_end.set()


def test_a_grammar_is_not_blamed_for_others_that_take_too_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(DESCRIPTION, vocab_size=VOCAB_SIZE, eos_ids=tokenizer.eos_ids, deadline_s=0.02)
    compile_now, may_end = compiler._compile_now, threading.Event()

    def compile_slowly(kind: str, source: str) -> Grammar:
        assert not source.startswith("slow") or may_end.wait(30)
        return compile_now(kind, source)

    monkeypatch.setattr(compiler, "_compile_now", compile_slowly)
    monkeypatch.setattr(compiler, "_deadline_s", 30)
    known = compiler.compile(Form(regex="known"))
    monkeypatch.setattr(compiler, "_deadline_s", 0.02)
    for number in range(MAX_COMPILING):
        with pytest.raises(GrammarError, match="takes longer"):
            compiler.compile(Form(regex=f"slow{number}"))
    with pytest.raises(GrammarBusyError, match="try again a little later"):
        compiler.compile(Form(regex="fine"))
    assert compiler.compile(Form(regex="known")) is known
    may_end.set()
    monkeypatch.setattr(compiler, "_deadline_s", 30)
    # The places are free once the threads have ended.
    while True:
        with contextlib.suppress(GrammarBusyError):
            assert compiler.compile(Form(regex="fine"))
            break


def test_a_compiler_that_crashes_is_an_error_and_frees_its_place(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(kind: str, source: str) -> Grammar:
        raise RuntimeError("a bug")

    # The thread's traceback goes to stderr.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compile_now", crash)
        for _ in range(MAX_COMPILING + 1):
            with pytest.raises(GrammarError, match=r"regex cannot be compiled"):
                compiler.compile(Form(regex="crash"))
    assert compiler.compile(Form(regex="crash"))


def test_only_the_last_grammars_are_kept(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.sampling.grammar.MAX_CACHED", 2)
    forms = [Form(json={"const": number}) for number in range(3)]
    first, second, _ = map(compiler.compile, forms)
    assert compiler.compile(forms[1]) is second
    assert compiler.compile(forms[0]) is not first


@pytest.mark.parametrize(
    ("description", "eos_ids", "message"), [(DESCRIPTION, (), "end token"), ("{}", (1,), "tokenizer")]
)
def test_a_model_without_what_is_needed_is_refused(description: str, eos_ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        GrammarCompiler(description, vocab_size=VOCAB_SIZE, eos_ids=eos_ids)


def test_hostile_forms_end_in_an_error_or_a_grammar(compiler: GrammarCompiler) -> None:
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1_900)}}
    hostile = [
        Form(regex="(a?){200}" * 20),
        Form(regex="((((a{1,50}){1,50}){1,50}){1,50})"),
        Form(json=wide),
        Form(json={"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        Form(grammar="start: x x\nx: x x | start |"),
        Form(choice=[str(number) * 5 for number in range(9_000)]),
    ]
    for form in hostile:
        with contextlib.suppress(GrammarError):
            assert allowed(compiler.compile(form).begin())
