"""The tiny model's card: its figures come from the records, and missed aims are stated."""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import asdict

import pytest

from tools.tiny.evaluate import Result
from tools.tiny.model_card import cpu_seconds, figure_table, missed_lines, router_line, training_record, write_card

RESULTS = [
    Result("unseen", "drawings, unseen artist", "share", 0.7, 240, 0.45, "pixel nearest neighbour", 0.65),
    Result("numbers", "numbers held out", "share", 0.4, 300, 0.001, "chance, whole number", 0.6),
    Result("handwriting", "handwritten digits", "share", 0.95, 297, 0.98, "1-nearest neighbour", 0.9),
    Result("tool-calls", "tool calls", "share", 0.99, 96),
    Result("text", "sentences", "bits/byte", 2.3, 34752, 2.162, "byte 6-gram", 2.162),
]


def test_table_has_model_baseline_and_aim() -> None:
    lines = figure_table(RESULTS).splitlines()
    assert lines[2] == (
        "| drawings, unseen artist | 240 | **70.0%** | 45.0% (pixel nearest neighbour) | 65.0%, reached |"
    )
    assert "60.0%, **missed**" in lines[3]
    assert lines[5].endswith("| none | none |")
    assert "below 2.162 bits/byte, **missed**" in lines[6]


def test_what_is_short_of_its_aim_or_baseline_is_said() -> None:
    text = missed_lines(RESULTS)
    assert "*numbers held out* missed its aim" in text
    assert "*handwritten digits* is below its baseline" in text
    assert "*sentences* missed its aim" in text
    assert "unseen artist" not in text
    assert "tool calls" not in text
    assert missed_lines(RESULTS[:1]) == ""


def test_router_load_is_in_even_shares() -> None:
    assert "2.00 and 0.00; 1.00 and 1.00 times" in router_line([[0.5, 0.5, 0, 0], [0.25] * 4])


def test_cpu_time_counts_all_runs_of_a_stage() -> None:
    assert cpu_seconds([{"cpu_s": 10}, {"cpu_s": 30}, {"cpu_s": 4}, {"cpu_s": 9}]) == 39


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    for stage in ("tower", "copy", "calls"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        line = {"step": 700, "used_s": 1200.0, "cpu_s": 1500.0, "loss": 1.5}
        (tmp_path / "run" / stage / "log.jsonl").write_text(json.dumps(line) + "\n")
    joint = {"steps": 2000, "minutes": 90, "cpu_minutes": 140, "loss": 3.5}
    (tmp_path / "stages.json").write_text(json.dumps({"joint": joint}))
    (tmp_path / "pictures.json").write_text(json.dumps({"pictures": {"drawings": 60000}}))
    package = {"name": "wordnet-base", "registry": "Debian", "version": "3.0", "licence": "WordNet3.0", "use": "text"}
    (tmp_path / "licences.json").write_text(json.dumps([package]))
    return tmp_path


def _write_results(path: pathlib.Path, quick: int | None) -> pathlib.Path:
    record = {
        "parameters": {"text": 5, "vision": 2, "projector": 1, "total": 8},
        "quick": quick,
        "results": [asdict(result) for result in RESULTS],
        "router_shares": [[0.5, 0.5]],
    }
    path.write_text(json.dumps(record))
    return path


def _model() -> pathlib.Path:
    return pathlib.Path(__file__).parents[3] / "configs" / "models" / "step3-tiny.json"


def test_card_holds_figures_training_data_and_notices(data: pathlib.Path) -> None:
    model = data / "model"
    model.mkdir()
    (model / "config.json").write_text(_model().read_text())
    card = data / "README.md"
    write_card(
        _write_results(data / "results.json", None),
        data,
        model,
        card,
        {"FP8 cache": _write_results(data / "fp8.json", None)},
        data / "stages.json",
    )
    text = card.read_text()
    parts = (
        "**70.0%**",
        "| tower | 700 | 20 | 25 | 1.50 |",
        "| joint | 2,000 | 90 | 140 | 3.50 |",
        "60,000 drawings",
        "Short of the mark",
        "| as shipped | FP8 cache |",
    )
    notices = "Alpaydin", "Princeton University", "CC-BY-4.0", "Apache-2.0", "wordnet-base (Debian)"
    for part in (*parts, *notices):
        assert part in text, part
    assert "{" not in text
    # The glossary's words: an image of a prompt is not a picture, a conversation not a dialogue.
    assert not re.search("pictures?|dialogues?", text)


def test_a_quick_run_makes_no_card(data: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="--quick 4"):
        write_card(_write_results(data / "results.json", 4), data, data, data / "README.md", {}, data / "stages.json")


def test_stages_of_earlier_runs_are_kept_and_new_ones_added(data: pathlib.Path) -> None:
    stages = training_record(data / "run", data / "stages.json")
    assert list(stages) == ["tower", "joint", "copy", "calls"]
    assert json.loads((data / "stages.json").read_text()) == stages
    assert list(training_record(data / "nowhere", data / "stages.json")) == list(stages)
    with pytest.raises(ValueError, match="no stage has a log"):
        training_record(data / "nowhere", data / "none.json")
