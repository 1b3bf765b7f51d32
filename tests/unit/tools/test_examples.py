"""Which candidates become the demo's examples, and how a run's newest checkpoint is found."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tools.tiny.examples import KINDS, pick, to_case, write_examples
from tools.tiny.export import restore_newest

ENTRIES = [
    {"kind": kind, "image": f"{index}{number}.png", "prompt": "What is this?", "expected": "x", "source": "drawn here"}
    for index, kind in enumerate(KINDS[:-1])
    for number in range(3)
] + [{"kind": "text", "prompt": f"Question {number}?", "expected": "Answer."} for number in range(3)]


def test_the_first_right_ones_of_each_kind_are_picked() -> None:
    is_right = [number % 3 != 0 for number in range(len(ENTRIES))]
    picked = pick(ENTRIES, is_right, 1)
    assert [entry["kind"] for entry in picked] == list(KINDS)
    assert picked[0] == ENTRIES[1]
    assert len(pick(ENTRIES, is_right, 5)) == 2 * len(KINDS)


def test_a_kind_without_a_right_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="'number'"):
        pick(ENTRIES, [entry["kind"] != "number" for entry in ENTRIES], 1)


def test_examples_are_written_with_their_sources_and_old_pictures_go(tmp_path: pathlib.Path) -> None:
    candidates, out = tmp_path / "candidates", tmp_path / "examples"
    candidates.mkdir()
    out.mkdir()
    pixels = np.arange(96 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 96, 3)
    Image.fromarray(pixels).save(candidates / "00.png")
    (out / "old.png").write_bytes(b"")
    write_examples(candidates, out, [ENTRIES[0], ENTRIES[-1]])
    assert sorted(path.name for path in out.iterdir()) == ["00.png", "ATTRIBUTION.md", "examples.json"]
    written = json.loads((out / "examples.json").read_text())
    assert written == [
        {"image": "00.png", "prompt": "What is this?", "expected": "x"},
        {"prompt": "Question 2?", "expected": "Answer."},
    ]
    assert "`00.png`: drawn here." in (out / "ATTRIBUTION.md").read_text()
    np.testing.assert_array_equal(to_case(out, written[0]).picture, pixels)
    assert to_case(out, written[1]).picture is None


def test_a_run_without_checkpoints_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        restore_newest(tmp_path / "checkpoints", "calls")
