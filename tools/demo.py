"""Asks the shipped model about the images that ship with it: `make demo`.

`models/step3-tiny/examples/examples.json` is a list of {"prompt": ..., "image": file in that folder (optional),
"expected": the right answer (optional)}.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
import time

from step3_jax import resources
from step3_jax.cli.choice import DEFAULT_MODEL
from step3_jax.cli.message import starts_thinking, user_message
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.output_parser import parse_output

MAX_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Example:
    """One question. `image` is a path; `answer` is the right answer, if known."""

    prompt: str
    image: pathlib.Path | None
    answer: str | None


def read_examples(folder: pathlib.Path) -> list[Example]:
    """The questions of a folder.

    Raises:
      ValueError: If the folder has none that can be read, or one of their images is missing.
    """
    path = folder / "examples.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the demo needs the shipped model and its images") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "prompt" in entry for entry in entries):
        raise ValueError(f'{path} must hold a list of objects with a "prompt"')
    examples = []
    for entry in entries:
        image = folder / entry["image"] if entry.get("image") else None
        if image is not None and not image.is_file():
            raise ValueError(f"{path} names {entry['image']}, which is not in {folder}")
        examples.append(Example(entry["prompt"], image, entry.get("expected")))
    return examples


def ask(llm: LLM, folder: pathlib.Path, example: Example) -> str:
    """The model's answer to a question."""
    images = [] if example.image is None else [str(example.image)]
    messages = [user_message(example.prompt, images)]
    output = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))[0].outputs[0]
    return parse_output(output.text, starts_thinking=starts_thinking(folder, messages)).content or ""


def show(llm: LLM, folder: pathlib.Path, example: Example) -> None:
    """Asks one question and prints it, the answer, and what was expected."""
    answer = ask(llm, folder, example)
    print(f"$ {command_of(example)}")
    print(f"  asked     {example.prompt}" + (f"  [{example.image.name}]" if example.image else ""))
    print(f"  answered  {answer or '(nothing)'}")
    if example.answer is not None:
        print(f"  expected  {example.answer}")
    print(flush=True)


def command_of(example: Example) -> str:
    """The command that asks the same question."""
    words = ["step3", "generate"]
    if example.image is not None:
        here = pathlib.Path.cwd()
        inside = example.image.is_relative_to(here)
        words += ["--image", str(example.image.relative_to(here) if inside else example.image)]
    return shlex.join([*words, "-p", example.prompt])


def main() -> int:
    """Runs the demo; 1 if its files are missing."""
    begin = time.perf_counter()
    try:
        folder = resources.find(DEFAULT_MODEL)
        examples = read_examples(folder / "examples")
        enable_compile_cache()
        llm = LLM(folder)
    except ValueError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    print(f"Loaded {folder.name} in {time.perf_counter() - begin:.1f} s.\n")
    for example in examples:
        show(llm, folder, example)
    print(f"{len(examples)} questions, {time.perf_counter() - begin:.1f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
