"""Splits the model's output into reasoning, content and tool calls, whole or piece by piece.

The released template ends a prompt inside `<think>`, so the output starts with reasoning. Content follows the first
`</think>`; without one, all of it is reasoning. The content holds at most one block of tool calls:

    <｜tool_calls_begin｜>
      <｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME">
        <steptml:parameter name="KEY">VALUE</steptml:parameter> ...
      </steptml:invoke><｜tool_call_end｜> ...
    <｜tool_calls_end｜>

Small deviations are tolerated: `function<｜tool_sep｜>`, the end of a call and that of the block may be missing. Text
between calls is dropped, and so are calls of another type and unterminated parameters. A marker out of place is text, and
so is a second block.

A call is delivered when it is complete. **One that is cut off (by `max_tokens`, say) is not a call**: its text, with
markers, becomes content when the output ends. So a stream has no partial calls, and none of the model's output is lost.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence

from step3_jax.text import tool_call
from step3_jax.text.scan import Trimmed, find_marker
from step3_jax.text.tool_call import Tool, ToolCall, cast_arguments, collect_schemas, make_call_id

THINK_BEGIN, THINK_END = "<think>", "</think>"

_NAME = re.compile(r"""\bname\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>/]+))""")


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call.

    Attributes:
      index: Number of the call in this output, from 0.
      id: The call's id; only in its first delta.
      name: The tool; only in its first delta.
      arguments: A piece of JSON text, "" in the first delta. All pieces of a call together are one JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclasses.dataclass(frozen=True)
class OutputDelta:
    """What a piece of output adds; at least one of the three fields.

    Attributes:
      reasoning: More of the reasoning. No content comes before it.
      content: More of the content.
      tool_calls: Parts of tool calls.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParsedOutput:
    """A whole output.

    Attributes:
      reasoning: The reasoning, without surrounding whitespace.
      content: The content, without surrounding whitespace.
      tool_calls: All complete calls.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside the reasoning, so that the output continues it."""
    return prompt.rfind(THINK_BEGIN) > prompt.rfind(THINK_END)


def is_reasoning_end(ids: Sequence[int], start_id: int, end_id: int) -> bool:
    """Whether reasoning is over at the end of a prompt or output.

    Args:
      ids: Token ids so far. The end of an earlier turn's reasoning counts only for that turn.
      start_id: Id of `<think>`.
      end_id: Id of `</think>`.

    Returns:
      Whether the last of the two tokens is the end; False if there is neither.
    """
    return next((token == end_id for token in reversed(ids) if token in (start_id, end_id)), False)


def count_reasoning_tokens(ids: Iterable[int], end_id: int) -> int:
    """Number of reasoning tokens of an output that starts inside the reasoning.

    Args:
      ids: Token ids of the output.
      end_id: Id of `</think>`.

    Returns:
      How many come before the first `</think>`; all, if there is none.
    """
    count = 0
    for token in ids:
        if token == end_id:
            break
        count += 1
    return count


def parse_output(text: str, tools: Sequence[Tool] | None = None, *, starts_thinking: bool = True) -> ParsedOutput:
    """Parses a whole output: the combined result of an `OutputParser`.

    Args:
      text: The model's output.
      tools: As in `OutputParser`.
      starts_thinking: As in `OutputParser`.

    Returns:
      Reasoning, content and complete tool calls.
    """
    parser = OutputParser(tools, starts_thinking=starts_thinking)
    return join_deltas([*parser.push(text), *parser.finish()])


def join_deltas(deltas: Iterable[OutputDelta]) -> ParsedOutput:
    """Combines the deltas of one output.

    Args:
      deltas: All results of `push` and `finish` of one `OutputParser`, in order.

    Returns:
      Reasoning, content and complete tool calls.
    """
    reasoning, content = [], []
    ids: dict[int, tuple[str, str]] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        reasoning.append(delta.reasoning)
        content.append(delta.content)
        for call in delta.tool_calls:
            if call.id is not None and call.name is not None:
                ids[call.index] = call.id, call.name
            arguments.setdefault(call.index, []).append(call.arguments)
    calls = (ToolCall(*ids[index], "".join(pieces)) for index, pieces in sorted(arguments.items()))
    return ParsedOutput("".join(reasoning), "".join(content), tuple(calls))


class _State(enum.Enum):
    """Where in the output the next letter is."""

    START = enum.auto()
    REASONING = enum.auto()
    CONTENT = enum.auto()
    BLOCK = enum.auto()  # Between calls.
    TYPE = enum.auto()  # From the start of a call to the separator.
    HEAD = enum.auto()  # From the separator to the tool's tag.
    IGNORED = enum.auto()  # In a call of another type.
    INVOKE_TAG = enum.auto()
    INVOKE = enum.auto()  # Between parameters.
    PARAMETER_TAG = enum.auto()
    VALUE = enum.auto()
    REST = enum.auto()  # Content that is not searched.


_ENDS_OF_CALL = (tool_call.CALL_END, tool_call.BLOCK_END)
_MARKERS: dict[_State, tuple[str, ...]] = {
    _State.REASONING: (THINK_END,),
    _State.CONTENT: (tool_call.BLOCK_BEGIN,),
    _State.BLOCK: (tool_call.CALL_BEGIN, tool_call.INVOKE_BEGIN, tool_call.BLOCK_END),
    _State.TYPE: (tool_call.SEPARATOR, tool_call.INVOKE_BEGIN, *_ENDS_OF_CALL),
    _State.HEAD: (tool_call.INVOKE_BEGIN, *_ENDS_OF_CALL),
    _State.IGNORED: _ENDS_OF_CALL,
    _State.INVOKE_TAG: (">",),
    _State.INVOKE: (tool_call.PARAMETER_BEGIN, tool_call.INVOKE_END, *_ENDS_OF_CALL),
    _State.PARAMETER_TAG: (">",),
    _State.VALUE: (tool_call.PARAMETER_END, tool_call.INVOKE_END),
    _State.REST: (),
}
_IN_CALL = frozenset(
    {_State.TYPE, _State.HEAD, _State.IGNORED, _State.INVOKE_TAG, _State.INVOKE, _State.PARAMETER_TAG, _State.VALUE}
)


class OutputParser:
    """Parses one output that arrives in pieces of any size.

    The combined deltas do not depend on the pieces, except for the ids of calls, which are random. Text is returned as soon
    as it cannot be a marker; whitespace around reasoning and content is dropped. Time and memory are linear in the output.
    """

    def __init__(self, tools: Sequence[Tool] | None = None, starts_thinking: bool = True) -> None:
        """Starts an output.

        Args:
          tools: The tools that the model was offered, as in OpenAI's APIs; their schemas give the types of parameters. A
            call of another tool is delivered too, with text values. Without tools nothing is a call, and markers are
            text.
          starts_thinking: Whether the prompt ended inside the reasoning; otherwise reasoning needs its own `<think>` at
            the start of the output.
        """
        self._schemas = collect_schemas(tools or ())
        self._has_tools = bool(tools)
        self._starts_thinking = starts_thinking
        self._state = _State.START
        self._held = ""
        self._reasoning, self._content = Trimmed(), Trimmed()
        self._deltas: list[OutputDelta] = []
        # Text of the tag, the type or the value that is being read.
        self._body: list[str] = []
        # All text of the block since its last complete call, in case the output ends here.
        self._unfinished: list[str] = []
        self._tool = ""
        self._parameter: str | None = None
        self._parameters: dict[str, str] = {}
        self._num_calls = 0

    def push(self, text: str) -> list[OutputDelta]:
        """Takes the next piece of output.

        Args:
          text: New text, of any length.

        Returns:
          What is certain now, in order; often empty.
        """
        text = self._held + text
        self._held = ""
        position = 0
        if self._state is _State.START:
            position = self._skip_opening(text, is_end=False)
        while position < len(text):
            position = self._read(text, position)
        return self._take_deltas()

    def finish(self) -> list[OutputDelta]:
        """Ends the output.

        Returns:
          The text held back: the start of a marker that did not come, and the text of an incomplete call.
        """
        held, self._held = self._held, ""
        if self._state is _State.START:
            held = held[self._skip_opening(held, is_end=True) :]
        self._keep(held)
        if self._state in _IN_CALL or self._state is _State.BLOCK:
            self._add_content("".join(self._unfinished))
        self._state = _State.REST
        return self._take_deltas()

    def _skip_opening(self, text: str, *, is_end: bool) -> int:
        """Skips a `<think>` at the very start; holds the text back until it is clear whether it is one."""
        start = text.lstrip()
        if not is_end and len(start) < len(THINK_BEGIN) and THINK_BEGIN.startswith(start):
            self._held = start
            return len(text)
        is_opened = start.startswith(THINK_BEGIN)
        self._state = _State.REASONING if self._starts_thinking or is_opened else self._content_state
        return len(text) - len(start) + (len(THINK_BEGIN) if is_opened else 0)

    @property
    def _content_state(self) -> _State:
        return _State.CONTENT if self._has_tools else _State.REST

    def _read(self, text: str, position: int) -> int:
        """Reads up to the end of the next marker, or all text that cannot be one; returns where to continue."""
        start, marker = find_marker(text, position, _MARKERS[self._state])
        if marker is None:
            self._keep(text[position:start])
            self._held = text[start:]
            return len(text)
        self._keep(text[position:start])
        if self._state not in (_State.REASONING, _State.CONTENT):
            self._unfinished.append(marker)
        self._pass(marker)
        return start + len(marker)

    def _keep(self, text: str) -> None:
        """Puts text without markers where it belongs."""
        if not text:
            return
        if self._state is _State.REASONING:
            self._add(OutputDelta(reasoning=self._reasoning.push(text)))
        elif self._state in (_State.CONTENT, _State.REST):
            self._add_content(text)
        elif self._state is not _State.BLOCK:
            self._unfinished.append(text)
            self._body.append(text)
        elif self._unfinished:
            self._unfinished.append(text)

    def _pass(self, marker: str) -> None:
        """Continues after a marker."""
        body = "".join(self._body)
        self._body = []
        if marker == THINK_END:
            self._state = self._content_state
        elif marker == tool_call.BLOCK_BEGIN:
            self._state = _State.BLOCK
            self._unfinished = [marker]
        elif marker == tool_call.CALL_BEGIN:
            self._state = _State.TYPE
        elif marker == tool_call.SEPARATOR:
            self._state = _State.HEAD if body.strip() in ("", tool_call.CALL_TYPE) else _State.IGNORED
        elif marker == tool_call.INVOKE_BEGIN:
            self._state = _State.INVOKE_TAG
        elif marker == tool_call.PARAMETER_BEGIN:
            self._state = _State.PARAMETER_TAG
        elif marker == ">":
            self._pass_tag(body)
        elif marker == tool_call.PARAMETER_END:
            if self._parameter is not None:
                self._parameters[self._parameter] = body
            self._state = _State.INVOKE
        elif marker == tool_call.INVOKE_END:
            self._end_invoke()
        else:
            self._end_call(marker)

    def _pass_tag(self, tag: str) -> None:
        """Continues after a tag; `tag` is the text between its name and `>`."""
        found = _NAME.search(tag)
        name = None if found is None else next(group for group in found.groups() if group is not None)
        if self._state is _State.PARAMETER_TAG:
            self._parameter = name
            self._state = _State.VALUE
        elif name is None:
            self._state = _State.IGNORED
        else:
            self._tool, self._parameters = name, {}
            self._state = _State.INVOKE
            if tag.endswith("/"):
                self._end_invoke()

    def _end_invoke(self) -> None:
        """Delivers a call."""
        arguments = cast_arguments(self._parameters, self._schemas.get(self._tool, {}))
        index = self._num_calls
        self._num_calls += 1
        self._add(OutputDelta(tool_calls=(ToolCallDelta(index, make_call_id(), self._tool, ""),)))
        self._add(OutputDelta(tool_calls=(ToolCallDelta(index, None, None, arguments),)))
        self._unfinished = []
        self._state = _State.BLOCK

    def _end_call(self, marker: str) -> None:
        if self._state is _State.INVOKE:
            # Only the closing tag is missing.
            self._end_invoke()
        self._unfinished = []
        self._state = _State.BLOCK if marker == tool_call.CALL_END else _State.REST

    def _add_content(self, text: str) -> None:
        self._add(OutputDelta(content=self._content.push(text)))

    def _add(self, delta: OutputDelta) -> None:
        """Adds to the next result, in one delta if the order allows it."""
        if delta == OutputDelta():
            return
        last = self._deltas[-1] if self._deltas else None
        if last is not None and not last.tool_calls and not delta.tool_calls:
            self._deltas[-1] = OutputDelta(last.reasoning + delta.reasoning, last.content + delta.content)
        else:
            self._deltas.append(delta)

    def _take_deltas(self) -> list[OutputDelta]:
        taken, self._deltas = self._deltas, []
        return taken
