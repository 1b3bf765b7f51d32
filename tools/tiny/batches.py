"""Training batches of the tiny model: pictures with questions, dialogues, and plain text."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.images import ImageTokenIds
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.train.data import Example, TokenRows, dialogue, pack_rows
from tools.tiny.copying import Calls, Values, quoted_values, recall_record, repeated_tokens
from tools.tiny.text_corpus import assistant_text
from tools.tiny.text_tools import format_tool_calls

KINDS = ("drawing", "number", "handwriting")
NUM_PLACES, NO_DIGIT = 4, 10
IMAGE_TOKENS, WINDOW_TOKENS, MAX_WINDOWS = 16, 9, 4
LARGE_ROWS = MAX_WINDOWS * WINDOW_TOKENS + IMAGE_TOKENS
SMALL_LENGTH, LARGE_LENGTH, TEXT_LENGTH, TOOL_LENGTH = 60, 104, 224, 448
GROUP_LENGTH, COPY_LENGTH = 768, 160
# Answers with their reasoning are at most this long, so that logits are computed for these places only.
NUM_SCORED = 22
# Share of each kind by sequences drawn: a sequence of plain text is about 100 tokens, a fact about 55.
TEXT_SHARES = {
    "sentences": 0.36,
    "glosses": 0.06,
    "capital": 0.24,
    "country": 0.08,
    "region": 0.05,
    "definition": 0.19,
    "small": 0.02,
}
FACT_KINDS = ("capital", "country", "region", "definition")
TOOL_SHARES = {"tools": 0.8, "results": 0.2}
# Of the last two stages: some of the text asks for a word back, and some rows are nothing but copying.
RECALL_SHARES = TEXT_SHARES | {"recall": 0.2}
COPY_SHARES = {"repeat": 0.4, "quote": 0.6}
# The reasoning before an answer about a picture is always the same and counts little.
REASONING_WEIGHT = 0.2
# So does the form of a tool call: what counts is the function's name and the values, each with the mark that ends it.
FORM_WEIGHT = 0.2
_CALL_TARGETS = re.compile(r'((?<=invoke name=")[^"]*|(?<=">)[^<>]*</(?=steptml:parameter>))')


class PictureBatch(NamedTuple):
    """Pictures of one size class and their dialogues.

    Attributes:
      views: uint8 [B, 64, 64, 3].
      windows: uint8 [B, 4, 48, 48, 3]; None for small pictures.
      num_windows: int32 [B]; None for small pictures.
      kinds: Index into KINDS, int32 [B].
      labels: Thing, number or digit, int32 [B].
      rows: The dialogues.
    """

    views: np.ndarray
    windows: np.ndarray | None
    num_windows: np.ndarray | None
    kinds: np.ndarray
    labels: np.ndarray
    rows: TokenRows | None


class Pools:
    """The pools of painted pictures, memory-mapped."""

    def __init__(self, data: pathlib.Path) -> None:
        self.pixels = [np.load(data / f"pool-{name}-pixels.npy", mmap_mode="r") for name in POOL_NAMES]
        self.labels = [np.load(data / f"pool-{name}-label.npy") for name in POOL_NAMES]
        names = ("view", "windows", "count", "kind", "label")
        self.large = {name: np.load(data / f"pool-large-{name}.npy", mmap_mode="r") for name in names}

    def draw(self, counts: tuple[int, int, int], rng: np.random.Generator) -> PictureBatch:
        """Small pictures, so many of each kind."""
        picked = [np.sort(rng.integers(len(self.labels[kind]), size=count)) for kind, count in enumerate(counts)]
        views = np.concatenate([self.pixels[kind][index] for kind, index in enumerate(picked)])
        labels = np.concatenate([self.labels[kind][index] for kind, index in enumerate(picked)])
        return PictureBatch(views, None, None, np.repeat(np.arange(3, dtype=np.int32), counts), labels, None)

    def draw_large(self, count: int, rng: np.random.Generator) -> PictureBatch:
        """Larger pictures with their windows, of all kinds."""
        index = np.sort(rng.integers(len(self.large["label"]), size=count))
        part = {name: np.asarray(array[index]) for name, array in self.large.items()}
        return PictureBatch(part["view"], part["windows"], part["count"], part["kind"], part["label"], None)


POOL_NAMES = ("drawings", "numbers", "handwriting")


def digit_places(kinds: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Digits of numbers and handwriting from the left, NO_DIGIT behind the last, int32 [B, 4]."""
    places = np.full((len(labels), NUM_PLACES), NO_DIGIT, np.int32)
    for row, (kind, label) in enumerate(zip(kinds, labels, strict=True)):
        if KINDS[kind] != "drawing":
            places[row, : len(str(label))] = [int(digit) for digit in str(label)]
    return places


class Dialogues:
    """Makes token sequences of the recorded questions and answers, in the shipped chat format."""

    def __init__(self, data: pathlib.Path, model: pathlib.Path) -> None:
        self.tokenizer = Tokenizer.load(model)
        self.template = ChatTemplate.load(model)
        self.image_ids = self.tokenizer.image_token_ids()
        self.eot = self.tokenizer.control_id("<|EOT|>")
        self.bot = self.tokenizer.control_id("<|BOT|>")
        self.end_of_reasoning = self.tokenizer.control_id("</think>")
        self.pictures = json.loads((data / "chat-pictures.json").read_text(encoding="utf-8"))
        self.things = json.loads((data / "things.json").read_text(encoding="utf-8"))
        self._prompts: dict[tuple[str, int], list[int]] = {}
        self._answers: dict[tuple[int, int], list[int]] = {}

    def picture(self, kind: int, label: int, num_windows: int, rng: np.random.Generator) -> Example:
        """A question about a picture and its answer."""
        task = self.pictures[KINDS[kind]]
        question = task["questions"][rng.integers(len(task["questions"]))]
        key = (question, num_windows)
        if key not in self._prompts:
            content = [{"type": "image", "image": "picture"}, {"type": "text", "text": question}]
            ids = self.template.encode_chat(self.tokenizer, [{"role": "user", "content": content}])
            place = ids.index(self.image_ids.im_patch)
            self._prompts[key] = [*ids[:place], *_image_ids(num_windows, self.image_ids), *ids[place + 1 :]]
        if (kind, label) not in self._answers:
            value = self.things[label]["answer"] if KINDS[kind] == "drawing" else str(label)
            answer = task["answer"].replace("{answer}", value)
            self._answers[kind, label] = self._answer_ids(task["reasoning"], answer)
        example = dialogue(self._prompts[key], self._answers[kind, label])
        end = len(self._prompts[key]) + self._answers[kind, label].index(self.end_of_reasoning)
        weights = [REASONING_WEIGHT * weight if place < end else weight for place, weight in enumerate(example.weights)]
        return Example(example.ids, weights)

    def record(self, record: dict) -> Example:
        """A recorded dialogue: a fact, a tool call, or the answer after a tool's result."""
        answer = format_tool_calls(record["calls"]) if record.get("calls") else record["answer"]
        return dialogue(self._prompt_ids(record), self._answer_ids(record["reasoning"], answer))

    def prefix_ids(self, tools: list[dict]) -> list[int]:
        """What all dialogues with the same tools start with."""
        prompt = self._prompt_ids({"question": "", "tools": tools})
        return prompt[: prompt.index(self.bot)]

    def after_prefix(self, record: dict) -> Example:
        """A dialogue with tools from its first turn on.

        What the form settles counts little: in a call the function's name and the values count in full, in an answer all
        that follows the reasoning.
        """
        prompt = self._prompt_ids({**record, "tools": None})  # the turns are the same, and quicker to make
        prompt = prompt[prompt.index(self.bot) :]
        if record.get("calls"):
            pieces = _CALL_TARGETS.split(assistant_text(record["reasoning"], format_tool_calls(record["calls"])))
            ids, weights = self.copies(pieces, outside=FORM_WEIGHT)
            ids, weights = [*ids, self.eot], [*weights, FORM_WEIGHT]
        else:
            ids = self._answer_ids(record["reasoning"], record["answer"])
            end = ids.index(self.end_of_reasoning)
            weights = [FORM_WEIGHT] * end + [1.0] * (len(ids) - end)
        return Example([*prompt, *ids], [0.0] * len(prompt) + weights)

    def copies(self, pieces: Sequence[str], *, outside: float = 0.0) -> Example:
        """Pieces of text of which every second one is a copy of something before it and counts in full."""
        encoded = [self.tokenizer.encode(piece) for piece in pieces]
        weights = [1.0 if number % 2 else outside for number, ids in enumerate(encoded) for _ in ids]
        return Example([token for ids in encoded for token in ids], weights)

    def _prompt_ids(self, record: dict) -> list[int]:
        messages = record.get("messages") or [{"role": "user", "content": record["question"]}]
        return self.template.encode_chat(self.tokenizer, messages, record.get("tools"))

    def _answer_ids(self, reasoning: str, answer: str) -> list[int]:
        return [*self.tokenizer.encode(assistant_text(reasoning, answer)), self.eot]


def _image_ids(num_windows: int, ids: ImageTokenIds) -> list[int]:
    """Places of one picture: its windows in rows of two, then the view; the last row ends without a newline."""
    out = []
    for window in range(num_windows):
        out += [ids.patch_start, *[ids.im_patch] * WINDOW_TOKENS, ids.patch_end]
        if num_windows == 4 and window == 1:
            out.append(ids.patch_newline)
    return [*out, ids.im_start, *[ids.im_patch] * IMAGE_TOKENS, ids.im_end]


def picture_batches(
    pools: Pools, dialogues: Dialogues, counts: tuple[int, int, int], num_large: int, rng: np.random.Generator
) -> Iterator[tuple[PictureBatch, PictureBatch]]:
    """Endless batches of small and larger pictures with their dialogues."""
    while True:
        batches = []
        for batch, length, rows_each in (
            (pools.draw(counts, rng), SMALL_LENGTH, IMAGE_TOKENS),
            (pools.draw_large(num_large, rng), LARGE_LENGTH, LARGE_ROWS),
        ):
            num_windows = batch.num_windows if batch.num_windows is not None else np.zeros(len(batch.labels), int)
            examples = [
                dialogues.picture(int(kind), int(label), int(count), rng)
                for kind, label, count in zip(batch.kinds, batch.labels, num_windows, strict=True)
            ]
            rows = pack_rows(
                iter([*examples, examples[0]]),
                num_rows=len(examples),
                length=length,
                image_id=dialogues.image_ids.im_patch,
                rows_each=rows_each,
            )
            if batch.num_windows is not None:
                rows.image_rows[...] = _skip_missing_windows(rows.image_rows, batch.num_windows)
            batches.append(batch._replace(rows=rows))
        yield tuple(batches)


def _skip_missing_windows(image_rows: np.ndarray, num_windows: np.ndarray) -> np.ndarray:
    """Feature rows of a picture are 4 windows, then the view: the view's places skip the windows that are not there."""
    start = np.arange(len(image_rows))[:, None] * LARGE_ROWS
    is_view = image_rows - start >= num_windows[:, None] * WINDOW_TOKENS
    missing = (MAX_WINDOWS - num_windows[:, None]) * WINDOW_TOKENS
    return np.where((image_rows >= 0) & is_view, image_rows + missing, image_rows)


def recorded_sources(
    data: pathlib.Path, dialogues: Dialogues, rng: np.random.Generator
) -> dict[str, Callable[[], Example]]:
    """What gives the next example of each kind of recorded text, in an order of its own."""
    records = {
        name: [json.loads(line) for line in (data / file).read_text(encoding="utf-8").splitlines()]
        for name, file in (
            ("facts", "chat-facts.jsonl"),
            ("small", "chat-small.jsonl"),
            ("tools", "chat-tools.jsonl"),
            ("results", "chat-tool-results.jsonl"),
        )
    }
    records |= {kind: [fact for fact in records["facts"] if fact["kind"] == kind] for kind in FACT_KINDS}
    lines = {
        name: (data / f"text-{name}-train.txt").read_text(encoding="utf-8").splitlines()
        for name in ("sentences", "glosses")
    }
    examples: dict[tuple[str, int], Example] = {}

    def next_lines(name: str, order: Iterator[int]) -> Example:
        text = "\n".join(lines[name][next(order)] for _ in range(8 if name == "sentences" else 5))
        ids = dialogues.tokenizer.encode(text + "\n", add_bos=True)
        return Example(ids, [1.0] * len(ids))

    def next_record(name: str, order: Iterator[int]) -> Example:
        key = (name, next(order))
        if key not in examples:
            examples[key] = dialogues.record(records[name][key[1]])
        return examples[key]

    def source(name: str, size: int, draw: Callable[[str, Iterator[int]], Example]) -> Callable[[], Example]:
        return functools.partial(draw, name, _endless_order(size, rng))

    return {name: source(name, len(found), next_record) for name, found in records.items()} | {
        name: source(name, len(found), next_lines) for name, found in lines.items()
    }


def copying_sources(values: Values, dialogues: Dialogues, rng: random.Random) -> dict[str, Callable[[], Example]]:
    """What gives the next example of each kind of text that asks for copying."""
    bos = dialogues.tokenizer.bos_id

    def repeat() -> Example:
        ids, weights = repeated_tokens(rng)
        return Example([bos, *ids], [0.0, *weights])

    def quote() -> Example:
        ids, weights = dialogues.copies(quoted_values(values, rng))
        return Example([bos, *ids], [0.0, *weights])

    return {"repeat": repeat, "quote": quote, "recall": lambda: dialogues.record(recall_record(values, rng))}


def mixed(
    sources: Mapping[str, Callable[[], Example]], shares: Mapping[str, float], rng: np.random.Generator
) -> Iterator[Example]:
    """Endless mix of the sources named in `shares`."""
    names, chances = list(shares), np.array(list(shares.values()))
    while True:
        yield sources[names[rng.choice(len(names), p=chances / chances.sum())]]()


def tool_groups(calls: Calls, dialogues: Dialogues) -> Iterator[tuple[list[int], list[Example]]]:
    """Endless groups of dialogues with the same tools: their common prefix, and how each goes on."""
    while True:
        group = calls.group()
        yield dialogues.prefix_ids(group[0]["tools"]), [dialogues.after_prefix(record) for record in group]


def _endless_order(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()
