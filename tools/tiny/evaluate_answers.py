"""Asks the model the questions of a set and compares its answers, letter by letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from tools.tiny.evaluate_cases import Case

MAX_TOKENS = {"picture": 32, "text": 96, "tools": 160}
_CALL = re.compile(
    r'<｜tool_call_begin｜>\nfunction<｜tool_sep｜><steptml:invoke name="([^"<>]+)">'
    r'((?:<steptml:parameter name="[^"<>]+">[^<>]*</steptml:parameter>)*)</steptml:invoke><｜tool_call_end｜>\n'
)
_PARAMETER = re.compile(r'<steptml:parameter name="([^"<>]+)">([^<>]*)</steptml:parameter>')
_CALLS_BEGIN, _CALLS_END = "<｜tool_calls_begin｜>\n", "<｜tool_calls_end｜>"

ParsedCall = tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """What the model answered in a case.

    Attributes:
      case: The question.
      text: All it wrote.
      answer: What follows the reasoning, "" if the reasoning never ends.
      is_right: Whether that is the right answer.
    """

    case: Case
    text: str
    answer: str
    is_right: bool


def ask_all(llm: LLM, cases: Sequence[Case]) -> list[Reply]:
    """Asks all questions of one kind, greedily, in batches of the engine's own size."""
    if not cases:
        return []
    has_picture, has_tools = cases[0].picture is not None, bool(cases[0].tools)
    kind = "picture" if has_picture else "tools" if has_tools else "text"
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS[kind])
    if has_tools:  # `chat` takes one list of tools for all conversations, these have a list each
        prompts = [llm.prompts.from_chat(conversation(case), tools=case.tools) for case in cases]
        outputs = llm.generate([{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts], params)
    else:
        outputs = llm.chat([conversation(case) for case in cases], params)
    return [judge(case, output.outputs[0].text) for case, output in zip(cases, outputs, strict=True)]


def conversation(case: Case) -> list[dict[str, object]]:
    """The case as chat messages."""
    if case.picture is None:
        return [{"role": "user", "content": case.question}]
    image = {"type": "image", "image": Image.fromarray(case.picture)}
    return [{"role": "user", "content": [image, {"type": "text", "text": case.question}]}]


def judge(case: Case, text: str) -> Reply:
    """Compares a text with the right answer: equal letter by letter, or the same calls with the same arguments."""
    answer = text.partition("</think>")[2].strip()
    if not case.tools:
        return Reply(case, text, answer, answer == case.answer)
    calls = parse_calls(answer)
    return Reply(case, text, answer, calls is not None and calls == parse_calls(case.answer))


def parse_calls(text: str) -> list[ParsedCall] | None:
    """Function names and arguments of a text that holds tool calls and nothing else; None for any other text."""
    if not (text.startswith(_CALLS_BEGIN) and text.endswith(_CALLS_END)):
        return None
    inner, calls, place = text[len(_CALLS_BEGIN) : -len(_CALLS_END)], [], 0
    while place < len(inner):
        match = _CALL.match(inner, place)
        if match is None:
            return None
        calls.append((match[1], dict(_PARAMETER.findall(match[2]))))
        place = match.end()
    return calls or None


def share_right(replies: Sequence[Reply]) -> float:
    """Share of right answers."""
    return sum(reply.is_right for reply in replies) / len(replies)


def share_right_digits(replies: Sequence[Reply]) -> float:
    """Share of the numbers' digits that are right at their position from the left; a missing digit is wrong."""
    right = total = 0
    for reply in replies:
        truth, said = (re.findall(r"\d+", text) for text in (reply.case.answer, reply.answer))
        digits = said[0] if said else ""
        total += len(truth[0])
        right += sum(a == b for a, b in zip(truth[0], digits, strict=False))
    return right / total


def share_right_functions(replies: Sequence[Reply]) -> float:
    """Share of replies that are well-formed calls of the right functions, whatever the arguments."""
    right = 0
    for reply in replies:
        said, truth = parse_calls(reply.answer), parse_calls(reply.case.answer)
        right += said is not None and truth is not None and [name for name, _ in said] == [name for name, _ in truth]
    return right / len(replies)
