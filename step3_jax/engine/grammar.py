"""Constraints of requests with structured outputs, with the model's own tokenizer and end tokens."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from step3_jax.engine.constraint import Constraint, Matcher
from step3_jax.engine.request import Prompt
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.output_parser import THINK_BEGIN, THINK_END
from step3_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from step3_jax.sampling.grammar import Grammar, GrammarCompiler


@dataclasses.dataclass(frozen=True)
class GrammarConstraint:
    """A grammar as a constraint; see `Constraint`."""

    grammar: Grammar
    begins_after: int | None

    def begin(self) -> Matcher:
        """See `Constraint.begin`."""
        return self.grammar.begin()


class ConstraintMaker:
    """Makes constraints for one model. Safe to share between threads; the first one reads the tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Takes the model's parts.

        Args:
          tokenizer: None refuses all constraints.
          vocab_size: V.
          eos_ids: The tokens that end an output.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def make(self, prompt: Prompt, params: SamplingParams) -> Constraint | None:
        """The constraint of a request; None for an unconstrained one.

        Args:
          prompt: If it ends inside the reasoning, the constraint starts after that.
          params: Their `structured_outputs` say what the output must be.

        Raises:
          ValueError: If it cannot be enforced, the model has no tokenizer or end token, or llguidance is not installed;
            GrammarBusyError if it may be possible later.
        """
        form = params.structured_outputs
        if form is None:
            return None
        if self._tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, but this model has none: add its tokenizer.json")
        grammar = self._get_compiler(self._tokenizer).compile(form)
        marks = [self._tokenizer.control_tokens.get(name) for name in (THINK_BEGIN, THINK_END)]
        last = next((token for token in reversed(prompt.token_ids) if token in marks), None)
        is_thinking = last is not None and last == marks[0]
        return GrammarConstraint(grammar, marks[1] if is_thinking else None)

    def is_ready(self, params: SamplingParams) -> bool:
        """Whether `make` has nothing to compile; never waits."""
        form, compiler = params.structured_outputs, self._compiler
        return form is None or (compiler is not None and compiler.is_cached(form))

    def _get_compiler(self, tokenizer: Tokenizer) -> GrammarCompiler:
        try:
            from step3_jax.sampling.grammar import GrammarCompiler  # noqa: PLC0415
        except ImportError:
            raise ValueError("structured_outputs need llguidance: pip install 'step3-jax[grammar]'") from None
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    tokenizer.description, vocab_size=self._vocab_size, eos_ids=self._eos_ids
                )
            return self._compiler
