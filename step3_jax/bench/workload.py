"""Requests to measure with: lengths from ranges or a file, random token ids, and a tokenizer for any vocabulary."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from step3_jax.planner.trace_file import parse_request, read_trace
from step3_jax.text.tokenizer import Tokenizer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# A byte-level vocabulary's letter for a space.
_SPACE = "Ġ"


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


def draw_lengths(count: int, prompt: tuple[int, int], output: tuple[int, int], *, seed: int = 0) -> list[Lengths]:
    """Lengths of `count` requests, each drawn uniformly from its range, including both ends.

    Raises:
      ValueError: If there is not at least one request, or a range is empty or starts below 1.
    """
    if count < 1:
        raise ValueError(f"{count} requests; at least 1 is needed")
    for name, (low, high) in (("prompt", prompt), ("output", output)):
        if not 1 <= low <= high:
            raise ValueError(f"{name} tokens are {low} to {high}; a range that starts at 1 or more is needed")
    rng = np.random.default_rng(seed)
    prompts = rng.integers(prompt[0], prompt[1], count, endpoint=True).tolist()
    outputs = rng.integers(output[0], output[1], count, endpoint=True).tolist()
    return [Lengths(*pair) for pair in zip(prompts, outputs, strict=True)]


def read_lengths(path: str | pathlib.Path) -> list[Lengths]:
    """Lengths from a trace, see `step3_jax.planner.trace_file.read_trace`; the model limits them.

    Raises:
      ValueError: If the file cannot be read, is empty, or has a malformed line.
    """
    return [Lengths(one.prompt_tokens, one.output_tokens) for one in read_trace(path, max_tokens=None)]


def parse_lengths(entry: object, where: str) -> Lengths:
    """Lengths from a JSON object, a line of a trace.

    Raises:
      ValueError: If it is malformed; the message starts with `where`.
    """
    request = parse_request(entry, where, max_tokens=None)
    return Lengths(request.prompt_tokens, request.output_tokens)


def random_prompts(lengths: Sequence[Lengths], vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids of a prompt for each request. Ids 0 and 1 are left out: they have a meaning in the measured models."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, one.prompt).tolist() for one in lengths]


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer in which every id is a separate word, so that a random model's output is text.

    Args:
      vocab_size: V.
    """
    width = 1
    while len(_LETTERS) ** width < vocab_size:
        width += 1
    vocabulary = {_SPACE + _word(number, width): number for number in range(vocab_size)}
    description = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return Tokenizer(json.dumps(description), source="the words")


def _word(number: int, width: int) -> str:
    letters = ""
    for _ in range(width):
        number, letter = divmod(number, len(_LETTERS))
        letters = _LETTERS[letter] + letters
    return letters
