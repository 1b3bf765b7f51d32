"""One answer of a chat as it grows: splits its text into reasoning, content and calls, and counts its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from step3_jax.engine.request import Logprob, StreamPiece
from step3_jax.server.protocol.chat import Delta, DeltaToolCall, MadeFunction
from step3_jax.text.output_parser import OutputDelta, OutputParser
from step3_jax.text.tool_call import Tool, ToolCall

FINISH_REASONS = {"stop": "stop", "length": "length"}


@dataclasses.dataclass(frozen=True)
class ChoiceForm:
    """How the text of an answer is split.

    Attributes:
      tools: The tools that may be called; None if calls are not parsed.
      starts_thinking: Whether the prompt ends inside the reasoning.
      thinking_ids: Ids of the marks around the reasoning; None for a model without them.
      is_parsed: Whether the text is split at all; otherwise all text is content.
      has_reasoning: Whether reasoning is part of the answer.
    """

    tools: Sequence[Tool] | None
    starts_thinking: bool
    thinking_ids: tuple[int, int] | None
    is_parsed: bool
    has_reasoning: bool


class ChoiceState:
    """One of the `n` answers.

    Attributes:
      token_ids: All tokens so far.
      logprobs: Log-probabilities of each token, if recorded.
      num_reasoning_tokens: Tokens of the reasoning.
      finish_reason: As the client sees it; None until the end.
      stop_reason: See `StreamPiece`.
    """

    def __init__(self, form: ChoiceForm) -> None:
        """Starts an empty answer."""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.num_reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._form = form
        self._parser = None
        if form.is_parsed or form.tools:
            self._parser = OutputParser(form.tools, starts_thinking=form.starts_thinking)
        self._is_thinking = form.starts_thinking
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: dict[int, ToolCall] = {}

    @property
    def reasoning(self) -> str | None:
        """All of the reasoning; None without any."""
        return "".join(self._reasoning) or None

    @property
    def content(self) -> str | None:
        """All of the content; None without any."""
        return "".join(self._content) or None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """All complete calls."""
        return [self._calls[index] for index in sorted(self._calls)]

    def add(self, piece: StreamPiece) -> list[Delta]:
        """Takes new output.

        Returns:
          The deltas for a stream: text first, then each part of a call separately. Text that may be a mark is held back.
        """
        self._count_reasoning(piece.token_ids)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or ()
        is_last = piece.finish_reason is not None
        deltas = self._parse(piece.text, is_last=is_last)
        made = [*self._take_text(deltas), *self._take_calls(deltas)]
        if piece.finish_reason is not None:
            is_call = bool(self._calls) and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if is_call else FINISH_REASONS[piece.finish_reason]
            self.stop_reason = piece.stop_reason
        return made

    def _parse(self, text: str, *, is_last: bool) -> list[OutputDelta]:
        if self._parser is None:
            return [OutputDelta(content=text)] if text else []
        deltas = self._parser.push(text)
        return [*deltas, *self._parser.finish()] if is_last else deltas

    def _take_text(self, deltas: Sequence[OutputDelta]) -> list[Delta]:
        content = "".join(delta.content for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas) if self._form.has_reasoning else ""
        self._content.append(content)
        self._reasoning.append(reasoning)
        values: dict[str, str] = {}
        if reasoning:
            values |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if content:
            values["content"] = content
        return [Delta(**values)] if values else []  # type: ignore[arg-type]

    def _take_calls(self, deltas: Sequence[OutputDelta]) -> list[Delta]:
        made = []
        for part in (call for delta in deltas for call in delta.tool_calls):
            if part.id is not None and part.name is not None:
                self._calls[part.index] = ToolCall(part.id, part.name, part.arguments)
                function = MadeFunction(name=part.name, arguments=part.arguments)
                call = DeltaToolCall(index=part.index, id=part.id, type="function", function=function)
            else:
                known = self._calls[part.index]
                self._calls[part.index] = dataclasses.replace(known, arguments=known.arguments + part.arguments)
                call = DeltaToolCall(index=part.index, function=MadeFunction(arguments=part.arguments))
            made.append(Delta(tool_calls=[call]))
        return made

    def _count_reasoning(self, token_ids: Sequence[int]) -> None:
        marks = self._form.thinking_ids
        if marks is None:
            return
        begin, end = marks
        for place, token in enumerate(token_ids):
            if token == end:
                self._is_thinking = False
            elif self._is_thinking:
                self.num_reasoning_tokens += 1
            elif token == begin and not self.token_ids and not place:
                self._is_thinking = True
