"""The stages of the tiny model's training: what a step of each is made of, and its batches."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from step3_jax.train.data import TokenRows, pack_prefixed, pack_rows
from step3_jax.train.loop import Schedule
from tools.tiny.batches import (
    COPY_LENGTH,
    COPY_SHARES,
    GROUP_LENGTH,
    RECALL_SHARES,
    TEXT_LENGTH,
    TEXT_SHARES,
    TOOL_LENGTH,
    TOOL_SHARES,
    Dialogues,
    PictureBatch,
    Pools,
    copying_sources,
    digit_places,
    mixed,
    picture_batches,
    recorded_sources,
    tool_groups,
)
from tools.tiny.copying import Calls, Values
from tools.tiny.evaluate_cases import held_out_calls
from tools.tiny.guide import bare_ids, find_sources

Counts = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a step of a stage is made of, and how it trains.

    Attributes:
      small: Drawings, numbers and handwriting in dialogues.
      extra: The same for the tower and its heads alone, which is cheap: numbers need the most pictures.
      large: Larger pictures in dialogues.
      text: Rows of plain text and dialogues.
      tools: Rows of tool calls.
      copies: Rows of text that asks for copying; with them tool calls are new each time, not the recorded ones.
      text_weight: Of plain text and dialogues beside tool calls and copies, in the stages that have copies.
      fixes_tower: Whether the tower and the projector stay as they are.
      minutes, rate: Time, and the highest learning rate, unless the command line has others.
      warmup, decay: Of the learning rate, see `Schedule`.
    """

    small: Counts
    extra: Counts
    large: int
    text: int
    tools: int = 1
    copies: int = 0
    text_weight: float = 1.0
    fixes_tower: bool = False
    minutes: float = 0.0
    rate: float = 2e-3
    warmup: float = 0.02
    decay: float = 0.6

    def schedule(self, rate: float | None) -> Schedule:
        """The learning rate over the stage, with another peak if one is given."""
        return Schedule(self.rate if rate is None else rate, self.warmup, self.decay)


STAGES = {
    "tower": Stage((64, 56, 16), (0, 0, 0), 0, 0, minutes=25),
    "joint": Stage((12, 32, 4), (4, 60, 0), 12, 6, minutes=100),
    "copy": Stage(
        (1, 3, 1), (2, 4, 1), 1, 2, tools=2, copies=4, fixes_tower=True, minutes=20, rate=1e-3, warmup=0.05, decay=0.1
    ),
    "calls": Stage(
        (10, 20, 8), (2, 4, 1), 4, 4, tools=2, copies=2, fixes_tower=True, minutes=14, rate=6e-4, warmup=0.05, decay=0.9
    ),
    "review": Stage(
        (8, 28, 3), (2, 40, 0), 8, 8, tools=2, copies=1, text_weight=2.0, minutes=45, rate=1e-3, warmup=0.03, decay=0.9
    ),
}
# From scratch, and on from a finished model: two that teach copying and lose facts, and one that brings the facts back.
FIRST_STAGES, COPYING_STAGES = ("tower", "joint"), ("copy", "calls", "review")


def head_targets(batch: PictureBatch) -> dict[str, np.ndarray]:
    """What the heads are to say about each picture."""
    return {
        "is_drawing": batch.kinds == 0,
        "labels": np.where(batch.kinds == 0, batch.labels, -1).astype(np.int32),
        "places": digit_places(batch.kinds, batch.labels),
    }


def tower_batches(pools: Pools, rng: np.random.Generator) -> Iterator[PyTree]:
    """Endless batches of the first stage."""
    while True:
        batch = pools.draw(STAGES["tower"].small, rng)
        yield {"views": batch.views, "targets": head_targets(batch)}


def joint_batches(
    stage: Stage, data: pathlib.Path, model: pathlib.Path, pools: Pools, rng: np.random.Generator
) -> Iterator[PyTree]:
    """Endless batches of a later stage."""
    dialogues = Dialogues(data, model)
    rows = copying_rows if stage.copies else recorded_rows
    texts = rows(stage, data, dialogues, rng)
    for small, large in picture_batches(pools, dialogues, stage.small, stage.large, rng):
        extra = pools.draw(stage.extra, rng)
        yield {
            "views": small.views,
            "extra_views": extra.views,
            "targets": jax.tree.map(lambda *parts: np.concatenate(parts), head_targets(small), head_targets(extra)),
            "small": small.rows,
            "large_views": large.views,
            "windows": large.windows,
            "large": large.rows,
        } | next(texts)


def recorded_rows(
    stage: Stage, data: pathlib.Path, dialogues: Dialogues, rng: np.random.Generator
) -> Iterator[dict[str, TokenRows]]:
    """Rows of text and of recorded tool calls."""
    sources = recorded_sources(data, dialogues, rng)
    texts, tools = mixed(sources, TEXT_SHARES, rng), mixed(sources, TOOL_SHARES, rng)
    while True:
        yield {
            "text": pack_rows(texts, num_rows=stage.text, length=TEXT_LENGTH),
            "tools": pack_rows(tools, num_rows=stage.tools, length=TOOL_LENGTH),
        }


def copying_rows(
    stage: Stage, data: pathlib.Path, dialogues: Dialogues, rng: np.random.Generator
) -> Iterator[dict[str, TokenRows | np.ndarray]]:
    """Rows of text, of tool calls with new values and of text that asks for copying; of these two the places copied from."""
    draw = random.Random(int(rng.integers(2**62)))
    values = Values.load(data, draw)
    facts = [json.loads(line) for line in (data / "chat-facts.jsonl").read_text(encoding="utf-8").splitlines()]
    groups = tool_groups(Calls(values, facts, held_out_calls(data), draw), dialogues)
    sources = recorded_sources(data, dialogues, rng) | copying_sources(values, dialogues, draw)
    texts, copies = mixed(sources, RECALL_SHARES, rng), mixed(sources, COPY_SHARES, rng)
    bare = bare_ids(dialogues.tokenizer)
    while True:
        guided = {
            "tools": pack_prefixed([next(groups) for _ in range(stage.tools)], length=GROUP_LENGTH),
            "copies": pack_rows(copies, num_rows=stage.copies, length=COPY_LENGTH),
        }
        sources_of = {f"{name}_sources": find_sources(rows, bare) for name, rows in guided.items()}
        yield {"text": pack_rows(texts, num_rows=stage.text, length=TEXT_LENGTH)} | guided | sources_of
