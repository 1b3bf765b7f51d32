"""`step3 chat`: a conversation in the terminal, or over a pipe with one question per line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from step3_jax.cli.choice import find_model, read_sampling
from step3_jax.cli.display import Display, default_show_reasoning, show_until_first, write_cut, write_note
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.message import read_tools, starts_thinking, stop_in_answer
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import interruptible
from step3_jax.cli.progress import show_progress
from step3_jax.cli.talk import Talk, run_talk
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tool_call import Tool

# The tokens of context that an answer gets at least; older turns are dropped to make room for it.
_ANSWER_SHARE = 4


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends; see `run_talk`."""
    if print_config(arguments):
        return 0
    choice = read_engine(arguments)
    params = read_sampling(arguments)
    tools = read_tools(arguments.tools)
    folder = find_model(arguments)
    check_before_loading(folder, max_model_len=choice.config.max_model_len)
    with show_progress(f"loading {folder}"):
        llm = load_llm(choice, folder)
    show_reasoning = default_show_reasoning() if arguments.reasoning is None else arguments.reasoning
    conversation = Conversation(
        llm, folder, params, system=arguments.system, show_reasoning=show_reasoning, tools=tools
    )
    return run_talk(conversation, folder.name)


class Conversation(Talk):
    """A conversation with a model that is loaded here."""

    def __init__(
        self,
        llm: LLM,
        folder: pathlib.Path,
        params: SamplingParams,
        *,
        system: str | None,
        show_reasoning: bool,
        tools: Sequence[Tool] = (),
    ) -> None:
        """Starts a conversation.

        Args:
          llm: The model.
          folder: Its folder, for the chat template.
          params: How answers are sampled.
          system: A system message.
          show_reasoning: Whether reasoning is shown.
          tools: Tools that the model may call. Calls are shown and remembered; nothing runs them.
        """
        super().__init__(system=system, show_reasoning=show_reasoning, tools=tools)
        self._llm, self._folder, self._params = llm, folder, params

    def _check_vision(self) -> None:
        if self._llm.config.vision is None:
            raise ValueError("this model has no vision tower, so it cannot be shown an image")

    def _answer(self, messages: list[dict[str, object]]) -> None:
        messages, params = self._fit(messages)
        is_thinking = starts_thinking(self._folder, messages)
        display = Display(starts_thinking=is_thinking, show_reasoning=self._show_reasoning, tools=self._tools)
        params, finish_reason = stop_in_answer(params, starts_thinking=is_thinking), None
        # If interrupted, the answer ends where it is, and the conversation continues from there.
        with contextlib.suppress(KeyboardInterrupt), interruptible():
            for piece in show_until_first(self._llm.chat(messages, params, tools=self._tools or None, stream=True)):
                display.push(piece.text)
                finish_reason = piece.finish_reason
        display.finish()
        if finish_reason == "length":
            limit = "--max-tokens" if params.max_tokens == self._params.max_tokens else "the end of the context"
            write_cut(display, limit)
        self._remember(messages, display)

    def _fit(self, messages: list[dict[str, object]]) -> tuple[list[dict[str, object]], SamplingParams]:
        """Drops the oldest turns until an answer has room, and shortens the answer to what is left."""
        limit, wanted = self._llm.max_model_len, self._params.max_tokens
        least = max(1, limit // _ANSWER_SHARE)
        if wanted is not None:
            least = min(least, wanted)
        # A turn is a question and its answer; the last question stays.
        first, last = len(self._begin), len(messages) - 1
        start = first
        room = self._room_after(messages)
        # The engine refuses a question that does not fit even alone.
        if room < least and self._room_after([*self._begin, messages[last]]) > 0:
            while room < least and start < last:
                start += 2
                room = self._room_after([*self._begin, *messages[start:]])
        if start > first:
            turns = "turn was" if start == first + 2 else f"{(start - first) // 2} turns were"
            write_note(f"(the conversation is full, {limit:,} tokens: the oldest {turns} left out; /reset starts over)")
        params = self._params
        if room > 0 and (wanted is None or wanted > room):
            params = dataclasses.replace(params, max_tokens=room)
        return [*self._begin, *messages[start:]], params

    def _room_after(self, messages: list[dict[str, object]]) -> int:
        """Tokens of the context that a conversation leaves for the answer."""
        return self._llm.max_model_len - len(self._llm.prompts.from_chat(messages, tools=self._tools or None).token_ids)
