"""Grammars that outputs must follow, using llguidance: compiled once, then matched token by token.

llguidance is an optional library, so this module is imported only for structured outputs.
"""

from __future__ import annotations

import collections
import json
import re
import threading
import time
from collections.abc import Sequence

import llguidance
import numpy as np
from jaxtyping import Int

from step3_jax.json_schema import BLANKS, subschemas
from step3_jax.sampling.structured import GrammarBusyError, StructuredOutputsParams

# Longest wait for a grammar to compile, and before that for others to be compiled.
DEADLINE_S = 5.0
# Compilations at once, so that hostile ones leave processors to others.
MAX_COMPILING = 2
MAX_CACHED = 64
# States of one grammar, about 1.5 kB each; as many as tokens of the longest output, as each may need one.
MAX_LEXER_STATES = 65_536


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why."""


class Grammar:
    """A compiled grammar. Safe to share between threads."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        """Takes a matcher that has seen no token."""
        self._matcher = matcher

    def begin(self) -> GrammarMatcher:
        """A matcher for one output."""
        return GrammarMatcher(self._matcher.deep_copy())


class GrammarMatcher:
    """Follows one output and says which tokens are allowed next."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        """Takes a matcher that has seen no token, and is not used elsewhere."""
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and cannot be longer, so that only end tokens are allowed."""
        return self._matcher.is_stopped()

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the output.

        Raises:
          GrammarError: If they do not follow the grammar, or it needs more work than is allowed.
        """
        # An end token after the end is not part of the grammar.
        if token_ids and not self._matcher.consume_tokens(list(token_ids)):
            raise GrammarError(_shorten(self._matcher.get_error()))

    def fill(self, mask: Int[np.ndarray, " words"]) -> None:
        """Writes which tokens are allowed next.

        Args:
          mask: A bit for each token of the model's vocabulary, token 0 in the lowest bit of the first word. End tokens are
            allowed where the output may end.

        Raises:
          GrammarError: If the grammar needs more work than is allowed.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise GrammarError(_shorten(self._matcher.get_error()))

    def find_forced(self) -> list[int]:
        """The forced next tokens, without end tokens; they are not accepted yet."""
        return self._matcher.compute_ff_tokens()


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to share between threads."""

    def __init__(
        self, tokenizer: str, *, vocab_size: int, eos_ids: Sequence[int], deadline_s: float = DEADLINE_S
    ) -> None:
        """Reads the tokenizer, which takes about a second for 128,000 tokens.

        Args:
          tokenizer: Text of a `tokenizer.json`.
          vocab_size: V, the size of the model's logits.
          eos_ids: The tokens that end an output.
          deadline_s: Time limit for one grammar.

        Raises:
          GrammarError: If the tokenizer cannot be used, or there is no end token.
        """
        if not eos_ids:
            raise GrammarError("structured outputs need an end token, but this model names none: add eos_token_id")
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_ids))
        except ValueError as error:
            raise GrammarError(f"structured outputs cannot use this model's tokenizer: {error}") from None
        self._limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[tuple[str, str], Grammar] = collections.OrderedDict()
        self._changed = threading.Condition()
        # Compilations in progress, and those of them that took too long, that requests no longer wait for.
        self._num_compiling = self._num_late = 0

    def is_cached(self, params: StructuredOutputsParams) -> bool:
        """Whether the grammar of a structured output is known, so that `compile` returns at once."""
        with self._lock:
            return (params.kind, params.source) in self._cache

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of a structured output; the last 64 are cached.

        Args:
          params: The structured output.

        Raises:
          GrammarError: If it is not valid, cannot be enforced exactly, or takes longer than the deadline. For a JSON schema
            the message gives the place.
          GrammarBusyError: If others are still being compiled; the grammar may be fine.
        """
        key = params.kind, params.source
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        grammar = self._compile_in_time(*key)
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile_in_time(self, kind: str, source: str) -> Grammar:
        """Compiles in a thread, which is abandoned if it takes too long; llguidance's own limits end it."""
        found: list[Grammar | GrammarError] = []
        is_over = is_late = False

        def run() -> None:
            nonlocal is_over
            try:
                found.append(self._compile_now(kind, source))
            except GrammarError as error:
                found.append(error)
            finally:
                with self._changed:
                    is_over = True
                    self._num_compiling -= 1
                    self._num_late -= is_late
                    self._changed.notify_all()

        self._take_place()
        thread = threading.Thread(target=run, name="compile-grammar", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        with self._changed:
            is_late = not is_over
            self._num_late += is_late
            self._changed.notify_all()
        if is_late:
            raise GrammarError(
                f"structured_outputs.{kind} takes longer than {self._deadline_s:g} s to compile; simplify it"
            )
        if not found:
            raise GrammarError(f"structured_outputs.{kind} cannot be compiled")
        if isinstance(found[0], GrammarError):
            raise found[0]
        return found[0]

    def _take_place(self) -> None:
        """Waits until another grammar may be compiled. Raises GrammarBusyError if that may take long."""
        end_s = time.monotonic() + self._deadline_s
        with self._changed:
            while self._num_compiling >= MAX_COMPILING:
                left_s = end_s - time.monotonic()
                # A place is free soon, unless all are taken by grammars that are late already.
                if self._num_late >= MAX_COMPILING or left_s <= 0:
                    raise GrammarBusyError(
                        "structured_outputs: other grammars are still being compiled; try again a little later"
                    )
                self._changed.wait(left_s)
            self._num_compiling += 1

    def _compile_now(self, kind: str, source: str) -> Grammar:
        try:
            text = _to_llguidance(kind, source)
        except ValueError as error:
            raise GrammarError(f"structured_outputs.{kind}: {_shorten(str(error))}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # A warning says what would not be enforced.
            problem = "; ".join(matcher.get_grammar_warnings())
        else:
            problem = self._find_problem(text) or matcher.get_error()
        if not problem:
            return Grammar(matcher)
        if kind == "json":
            path = self._find_place(json.loads(source), problem)
            raise GrammarError(f"structured_outputs.json{path}: {_shorten(problem)}")
        raise GrammarError(f"structured_outputs.{kind}: {_shorten(_name_line(problem, source))}")

    def _find_problem(self, text: str) -> str:
        """Why a grammar cannot be used; "" if it can."""
        _, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, self._tokenizer, limits=self._limits)
        return "; ".join(messages)

    def _find_place(self, schema: dict[str, object], problem: str) -> str:
        """The place of the innermost schema with the problem, as a JSON pointer."""
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place, node = "", schema
        while True:
            for step, child in subschemas(node):
                if not isinstance(child, dict):
                    continue
                text = _to_llguidance("json", json.dumps(shared | child if _has_reference(child) else child))
                if self._find_problem(text) == problem:
                    place, node = place + step, child
                    break
            else:
                return place


def _to_llguidance(kind: str, source: str) -> str:
    if kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": BLANKS})
    return llguidance.grammar_from(kind, source)  # type: ignore[arg-type]


def _name_line(problem: str, source: str) -> str:
    """A problem with the start of its line, instead of the surrounding lines that llguidance shows."""
    found = re.match(r"at (\d+)\(\d+\): (.*?)\n\s+\d+ \|", problem, re.DOTALL)
    lines = source.splitlines()
    if found is None or not 0 < int(found[1]) <= len(lines):
        return problem
    return f"line {found[1]}, {lines[int(found[1]) - 1][:60]!r}: {found[2]}"


def _has_reference(schema: object) -> bool:
    return '"$ref"' in json.dumps(schema)


def _shorten(message: str) -> str:
    """One line of a message, without the parser's state."""
    text = " ".join(message.partition("<state>")[0].split())
    return text if len(text) <= 300 else text[:300] + "..."
