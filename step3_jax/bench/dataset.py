"""Requests to load a service with: from a file, or random words of given lengths."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from step3_jax.bench.workload import Lengths, parse_lengths

# Short and frequent, so that they are one token each in most vocabularies.
_WORDS = (
    "the of and to in is it for on as with was that by at from this have not are they which one had but what all were when "
    "we there can an your said if do will each about how up out them then she many some so these would other into has more "
    "her two like him see time could no make than first been its who now people my made over did down only way find use may"
).split()


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """One request.

    Attributes:
      messages: The conversation.
      max_tokens: Most tokens of the answer; None for the service's own limit.
    """

    messages: Sequence[Mapping[str, object]]
    max_tokens: int | None

    def body(self, model: str, path: str, extra: Mapping[str, object]) -> dict[str, object]:
        """The body to send.

        Args:
          model: The model's name.
          path: `chat/completions`, or `completions`, which gets the texts of the messages.
          extra: Further fields; they take precedence.
        """
        body: dict[str, object] = {"model": model, "stream_options": {"include_usage": True}}
        if path == "completions":
            body["prompt"] = "\n".join(str(message["content"]) for message in self.messages)
        else:
            body["messages"] = self.messages
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body | dict(extra)


def make_requests(lengths: Sequence[Lengths], *, seed: int = 0) -> list[LoadRequest]:
    """Requests of random words; no two start the same, so that no prefix cache helps.

    Args:
      lengths: Lengths in tokens, drawn as about as many words: the vocabulary decides how many tokens they are, and the
        service counts them. The output is at most as long as given.
      seed: Seed of the words.
    """
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(_WORDS, max(1, one.prompt)).tolist()) for one in lengths]
    return [
        LoadRequest([{"role": "user", "content": text}], one.output) for text, one in zip(texts, lengths, strict=True)
    ]


def read_requests(path: str | pathlib.Path, *, seed: int = 0) -> list[LoadRequest]:
    """Requests from a file with a JSON object on each line.

    Args:
      path: Each line has `messages`, or `prompt` (a text), optionally with `max_tokens`; or `prompt_tokens` and
        `output_tokens`, for which random words are drawn. Other keys are ignored.
      seed: Seed of the words.

    Raises:
      ValueError: If the file cannot be read, is empty, or has a malformed line.
    """
    file = pathlib.Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = [
        _parse(line, f"{file}, line {number}", seed + number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{file} has no requests; a JSON object on each line is needed")
    return found


def _parse(line: str, where: str, seed: int) -> LoadRequest:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {line[:80]!r} is not a JSON object")
    if "messages" not in entry and "prompt" not in entry:
        return make_requests([parse_lengths(entry, where)], seed=seed)[0]
    messages = entry.get("messages", [{"role": "user", "content": entry.get("prompt")}])
    is_right = isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
    if not is_right or not all(isinstance(one.get("content"), str | list) for one in messages):
        raise ValueError(f"{where}: `messages` must be a list of objects with content, or `prompt` a text")
    limit = entry.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"{where}: max_tokens is {limit!r}; a whole number of at least 1 is needed")
    return LoadRequest(messages, limit)
