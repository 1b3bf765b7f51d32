"""`step3 generate`: answers one prompt, with or without images.

The answer goes to stdout, everything about it to stderr; with --json it is all one object on stdout's last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence

from step3_jax.cli.choice import find_model, read_sampling
from step3_jax.cli.display import (
    ANSWERING,
    Display,
    default_show_reasoning,
    show_until_first,
    write_cut,
    write_note,
)
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.message import (
    check_images,
    read_tools,
    starts_thinking,
    stop_in_answer,
    system_messages,
    user_message,
)
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import read_stdin
from step3_jax.cli.progress import show_progress
from step3_jax.engine.llm import LLM
from step3_jax.engine.request import CompletionOutput, Logprob, RequestOutput
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.output_parser import is_thinking, parse_output
from step3_jax.text.tool_call import Tool


def run(arguments: argparse.Namespace) -> int:
    """Answers the prompt.

    Raises:
      ValueError: For conflicting options, and for everything the engine refuses.
    """
    if print_config(arguments):
        return 0
    _check_together(arguments)
    choice = read_engine(arguments)
    params = read_sampling(arguments, n=arguments.n, logprobs=arguments.logprobs)
    prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    check_images(arguments.image)
    tools = read_tools(arguments.tools)
    folder = find_model(arguments)
    check_before_loading(
        folder,
        max_model_len=choice.config.max_model_len,
        num_images=len(arguments.image),
        needs_template=not arguments.raw,
    )

    begin = time.perf_counter()
    with show_progress(f"loading {folder}"):
        llm = load_llm(choice, folder)
    load_s = time.perf_counter() - begin

    call = _Call(llm, folder, prompt, arguments, tools)
    params = stop_in_answer(params, starts_thinking=call.starts_thinking)
    if arguments.json:
        print(json.dumps(_to_json(call, call.run(params), folder, load_s, params.seed)))
    elif arguments.n > 1 or arguments.stream is False:
        call.show(params, load_s)
    else:
        call.stream(params, load_s)
    return 0


class _Call:
    """The prompt in the engine's form."""

    def __init__(
        self, llm: LLM, folder: pathlib.Path, prompt: str, arguments: argparse.Namespace, tools: Sequence[Tool]
    ) -> None:
        self._llm = llm
        self._prompt = prompt
        self._images: list[str] = arguments.image
        self._is_raw: bool = arguments.raw
        self.tools = tools
        self._messages = [*system_messages(arguments.system), user_message(prompt, arguments.image)]
        self._show_reasoning = default_show_reasoning() if arguments.reasoning is None else arguments.reasoning
        self.starts_thinking = is_thinking(prompt) if arguments.raw else starts_thinking(folder, self._messages)

    def run(self, params: SamplingParams) -> RequestOutput:
        """The whole answer at once."""
        with show_progress(ANSWERING):
            if self._is_raw:
                return self._llm.generate(self._prompt, params, images=self._images or None)[0]
            return self._llm.chat(self._messages, params, tools=self.tools or None)[0]

    def show(self, params: SamplingParams, load_s: float) -> None:
        """Prints whole answers."""
        output = self.run(params)
        for completion in output.outputs:
            if params.n > 1:
                write_note(f"[{completion.index + 1} of {params.n}]")
            display = self._display()
            display.push(completion.text)
            display.finish()
            _write_length_note(completion.finish_reason, display)
        metrics = output.metrics
        write_note(
            _timing_line(metrics.num_generated_tokens, metrics.tokens_per_s, metrics.time_to_first_token_s, load_s)
        )

    def stream(self, params: SamplingParams, load_s: float) -> None:
        """Prints the answer as it arrives."""
        if self._is_raw:
            pieces = self._llm.generate(self._prompt, params, images=self._images or None, stream=True)
        else:
            pieces = self._llm.chat(self._messages, params, tools=self.tools or None, stream=True)
        display = self._display()
        begin = time.perf_counter()
        first, num_tokens, finish_reason = None, 0, None
        for piece in show_until_first(pieces):
            first = first or time.perf_counter()
            num_tokens += len(piece.token_ids)
            finish_reason = piece.finish_reason
            display.push(piece.text)
        display.finish()
        end = time.perf_counter()
        first = first or end
        _write_length_note(finish_reason, display)
        rate = num_tokens / (end - first) if end > first else 0.0
        write_note(_timing_line(num_tokens, rate, first - begin, load_s))

    def _display(self) -> Display:
        return Display(starts_thinking=self.starts_thinking, show_reasoning=self._show_reasoning, tools=self.tools)


def _check_together(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None:
        raise ValueError("there is nothing to answer: give the prompt with -p TEXT, or -p - to read it from stdin")
    if arguments.stream and (arguments.json or arguments.n > 1):
        raise ValueError(
            "--stream shows one answer as text: leave it out with --json or --n, which print whole answers"
        )
    if arguments.logprobs is not None and not arguments.json:
        raise ValueError("--logprobs cannot be shown as plain text: add --json")
    if arguments.raw and arguments.system is not None:
        raise ValueError("--system is part of the chat template, which --raw leaves out: write it into the prompt")
    if arguments.raw and arguments.tools is not None:
        raise ValueError("--tools are part of the chat template, which --raw leaves out: write them into the prompt")


def _write_length_note(finish_reason: str | None, display: Display) -> None:
    if finish_reason == "length":
        write_cut(display, "--max-tokens")


def _timing_line(num_tokens: int, tokens_per_s: float, first_s: float, load_s: float) -> str:
    return (
        f"{num_tokens} tokens, {tokens_per_s:.1f} tokens/s, first after {first_s:.2f} s, model loaded in {load_s:.1f} s"
    )


def _to_json(
    call: _Call, output: RequestOutput, folder: pathlib.Path, load_s: float, seed: int | None
) -> dict[str, object]:
    """The object that --json prints; with several answers the first is at the top, and all are in `outputs`."""
    answers = [_answer_to_json(call, completion) for completion in output.outputs]
    metrics = output.metrics
    found: dict[str, object] = {
        "model": str(folder),
        **answers[0],
        "prompt_tokens": metrics.num_prompt_tokens,
        "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        "time_to_first_token_s": metrics.time_to_first_token_s,
        "tokens_per_second": metrics.tokens_per_s,
        "compile_s": metrics.compile_s,
        "load_s": load_s,
        "seed": seed,
    }
    return found | ({"outputs": answers} if len(answers) > 1 else {})


def _answer_to_json(call: _Call, completion: CompletionOutput) -> dict[str, object]:
    parsed = parse_output(completion.text, call.tools, starts_thinking=call.starts_thinking)
    found: dict[str, object] = {
        "text": parsed.content,
        "reasoning": parsed.reasoning,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if call.tools:
        found["tool_calls"] = [dataclasses.asdict(tool_call) for tool_call in parsed.tool_calls]
    if completion.logprobs is not None:
        found["logprobs"] = [
            {**_logprob_to_json(token, record[token]), "top": [_logprob_to_json(*item) for item in record.items()]}
            for token, record in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    return found


def _logprob_to_json(token: int, found: Logprob) -> dict[str, object]:
    return {"token_id": token, "token": found.decoded_token, "logprob": found.logprob, "rank": found.rank}
