"""The questions that the tiny Step3 is judged by: held-out pictures, recorded facts, tool calls."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny.copying import read_places
from tools.tiny.text_tools import FUNCTIONS, ask, draw_arguments, format_tool_calls, offer

TILE, TILES_IN_ROW = 64, 10
NUM_OTHER_FACTS, NUM_CALLS_EACH = 50, 12
CALL_SEED, CALL_TRIES = 101, 40
PICTURE_TASKS = {
    "unseen-clean": "drawing",
    "unseen-mild": "drawing",
    "seen": "drawing",
    "numbers": "number",
    "handwriting": "handwriting",
    "large-drawings": "drawing",
    "large-numbers": "number",
}


@dataclass(frozen=True)
class Case:
    """One question with the one right answer.

    Attributes:
      question: What the user writes.
      answer: The whole text that has to follow the reasoning.
      picture: uint8 [height, width, 3], or None.
      tools: JSON schemas of the functions on offer.
    """

    question: str
    answer: str
    picture: np.ndarray | None = None
    tools: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class CaseSet:
    """Cases that are counted together.

    Attributes:
      name: Key of the set, as in the results.
      title: What the table says.
      cases: The questions.
    """

    name: str
    title: str
    cases: tuple[Case, ...]

    def take(self, count: int | None) -> CaseSet:
        """The same set with at most `count` cases, spread evenly; all of them if None."""
        if count is None or count >= len(self.cases):
            return self
        picked = np.linspace(0, len(self.cases) - 1, count).round().astype(int)
        return replace(self, cases=tuple(self.cases[index] for index in picked))


def picture_cases(
    task: Mapping[str, object], pictures: Sequence[np.ndarray], values: Sequence[str]
) -> tuple[Case, ...]:
    """A question about each picture, the task's questions taking turns.

    Args:
      task: A kind's part of `chat-pictures.json`.
      pictures: uint8 [height, width, 3] each.
      values: What stands in the answer: a number, or a thing's whole sentence.
    """
    questions = task["questions"]
    return tuple(
        Case(questions[index % len(questions)], str(task["answer"]).replace("{answer}", value), picture)
        for index, (picture, value) in enumerate(zip(pictures, values, strict=True))
    )


def load_picture_sets(data: Path) -> list[CaseSet]:
    """All held-out pictures.

    Raises:
      ValueError: If the pictures have not been made.
    """
    for name, maker in (("heldout.npz", "pictures"), ("heldout-large.npz", "held_out")):
        if not (data / name).exists():
            raise ValueError(f"no {name} in {data}; run `python -m tools.tiny.{maker}` with the same --data first")
    with np.load(data / "heldout.npz") as small, np.load(data / "heldout-large.npz") as large:
        arrays = {**small, **large}
    things = [thing["answer"] for thing in json.loads((data / "things.json").read_text(encoding="utf-8"))]
    is_clean = np.arange(len(arrays["drawings_label"])) % 3 == 0
    drawings, labels = arrays["drawings_pixels"], arrays["drawings_label"]
    parts = {
        "unseen-clean": ("drawings, unseen artist, plain", drawings[is_clean], labels[is_clean]),
        "unseen-mild": ("drawings, unseen artist, mildly augmented", drawings[~is_clean], labels[~is_clean]),
        "seen": ("drawings, seen artists, new augmentation", arrays["seen_pixels"], arrays["seen_label"]),
        "numbers": ("numbers and fonts held out", arrays["numbers_pixels"], arrays["numbers_label"]),
        "handwriting": ("handwritten digits held out", arrays["handwriting_pixels"], arrays["handwriting_label"]),
        "large-drawings": (
            "larger images: drawings, unseen artist",
            arrays["large_drawings_pixels"],
            arrays["large_drawings_label"],
        ),
        "large-numbers": (
            "larger images: numbers and fonts held out",
            arrays["large_numbers_pixels"],
            arrays["large_numbers_label"],
        ),
    }
    tasks = json.loads((data / "chat-pictures.json").read_text(encoding="utf-8"))
    sets = []
    for name, (title, pixels, numbers) in parts.items():
        task = PICTURE_TASKS[name]
        values = [things[number] if task == "drawing" else str(number) for number in numbers]
        sets.append(CaseSet(name, title, picture_cases(tasks[task], pixels, values)))
    return sets


def load_fact_sets(data: Path) -> list[CaseSet]:
    """All questions for capitals, and some of each other kind of fact. The model was trained on them."""
    facts = [json.loads(line) for line in (data / "chat-facts.jsonl").read_text(encoding="utf-8").splitlines()]
    by_kind: dict[str, dict[str, Case]] = {}
    for fact in facts:
        by_kind.setdefault(fact["kind"], {})[fact["question"]] = Case(fact["question"], fact["answer"])
    sets = {kind: CaseSet(kind, kind, tuple(cases.values())) for kind, cases in by_kind.items()}
    others = [case for kind, part in sets.items() if kind != "capital" for case in part.take(NUM_OTHER_FACTS).cases]
    return [
        CaseSet("capitals", "capitals: recall of training facts", sets["capital"].cases),
        CaseSet("other-facts", "other facts: recall of training facts", tuple(others)),
    ]


def draw_call_cases(data: Path) -> Iterator[tuple[Case, bool]]:
    """Questions that need one tool call, in the training's own form, and whether each is new to the recorded ones."""
    rows = [json.loads(line) for line in (data / "chat-tools.jsonl").read_text(encoding="utf-8").splitlines()]
    known = {row["question"] for row in rows}
    places = read_places(data)
    rng = random.Random(CALL_SEED)
    for name in FUNCTIONS:
        for _ in range(NUM_CALLS_EACH):
            for _ in range(CALL_TRIES):  # some functions have few possible questions, all of them known
                values = draw_arguments(name, *places, rng)
                question = ask(name, values, rng)
                if question not in known:
                    break
            answer = format_tool_calls([{"name": name, "arguments": values}])
            yield Case(question, answer, tools=tuple(offer([name], rng))), question not in known


def load_call_set(data: Path) -> CaseSet:
    """Fresh questions that need one tool call; new to the model where one can be."""
    drawn = list(draw_call_cases(data))
    num_new = sum(is_new for _, is_new in drawn)
    title = f"tool calls in the training's form, {num_new} of {len(drawn)} questions new"
    return CaseSet("tool-calls", title, tuple(case for case, _ in drawn))


def held_out_calls(data: Path) -> frozenset[str]:
    """The calls, as the model has to write them, that answer the new questions: training draws none of them afresh."""
    return frozenset(case.answer for case, is_new in draw_call_cases(data) if is_new)


def load_sets(data: Path) -> Iterator[CaseSet]:
    """Every set of the evaluation, from a data folder."""
    yield from load_picture_sets(data)
    yield from load_fact_sets(data)
    yield load_call_set(data)


def load_committed_sets(folder: Path) -> list[CaseSet]:
    """The small sets that the repository's own tests use, from `tests/heldout` (see `tools.tiny.held_out`)."""
    record = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    sets = []
    for name, part in record["sets"].items():
        pictures: list[np.ndarray | None] = [None] * len(part["cases"])
        if "file" in part:
            with Image.open(folder / part["file"]) as sheet:
                pictures = list(cut_sheet(np.asarray(sheet.convert("RGB")), len(part["cases"])))
        cases = [
            Case(case["question"], case["answer"], picture, tuple(case.get("tools", ())))
            for case, picture in zip(part["cases"], pictures, strict=True)
        ]
        sets.append(CaseSet(name, part["title"], tuple(cases)))
    return sets


def cut_sheet(sheet: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The first `count` tiles of a sheet, row by row."""
    for index in range(count):
        top, left = (TILE * place for place in divmod(index, TILES_IN_ROW))
        yield sheet[top : top + TILE, left : left + TILE]


def join_sheet(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Puts 64x64 tiles side by side; black behind the last."""
    rows = -(-len(tiles) // TILES_IN_ROW)
    sheet = np.zeros((rows * TILE, TILES_IN_ROW * TILE, 3), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (TILE * place for place in divmod(index, TILES_IN_ROW))
        sheet[top : top + TILE, left : left + TILE] = tile
    return sheet
