"""What the busiest group of experts gets, and which experts are read."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from step3_jax.config import ModelConfig
from step3_jax.planner.expert_load import even_load, read_load

CONFIG = ModelConfig.preset("step3").text


def write(folder: pathlib.Path, values: object) -> pathlib.Path:
    file = folder / "load.json"
    file.write_text(json.dumps(values))
    return file


def test_an_even_load_has_no_imbalance() -> None:
    load = even_load(CONFIG)
    assert load.find_imbalance(1) == pytest.approx(1)
    assert load.find_imbalance(16) == pytest.approx(1)
    tokens = np.array([1024.0])
    assert load.count_busiest(tokens, 16, by_chance=False) == pytest.approx(1024 * 3 / 16)


def test_by_chance_the_busiest_group_gets_about_as_much_as_a_draw_gives_it() -> None:
    load, groups, tokens = even_load(CONFIG), 16, 512
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(300):
        # Three different experts of each token.
        chosen = rng.random((tokens, 48)).argpartition(3, axis=1)[:, :3]
        counts.append(np.bincount(chosen.ravel() // (48 // groups), minlength=groups).max())
    counted = load.count_busiest(np.array([float(tokens)]), groups, by_chance=True)[0]
    assert np.mean(counts) <= counted < 1.1 * np.mean(counts)


def test_one_token_is_not_more_than_its_own_experts() -> None:
    load = even_load(CONFIG)
    assert load.count_busiest(np.array([1.0]), 48, by_chance=True) == 1
    assert 1.5 < load.count_busiest(np.array([1.0]), 2, by_chance=True) <= 3


def test_the_experts_that_are_read_are_those_that_some_token_chooses() -> None:
    found = even_load(CONFIG).find_touched(np.array([1.0, 16.0, 4096.0]))
    assert found == pytest.approx([3 / 48, 1 - (45 / 48) ** 16, 1])


def test_a_measured_load_makes_the_busiest_group_busier(tmp_path: pathlib.Path) -> None:
    counts = [1] * 24 + [3] * 24
    load = read_load(write(tmp_path, counts), CONFIG)
    assert load.find_imbalance(2) == pytest.approx(1.5)
    layers = read_load(write(tmp_path, [counts] * 28 + [[1] * 48] * 28), CONFIG)
    assert layers.find_imbalance(2) == pytest.approx(1.25)


def test_many_different_shares_are_read_as_well_as_a_few(tmp_path: pathlib.Path) -> None:
    counts = np.random.default_rng(0).integers(50, 150, (56, 48))
    load = read_load(write(tmp_path, counts.tolist()), CONFIG)
    shares = counts / counts.sum(axis=1, keepdims=True) * 3
    assert load.find_touched(np.array([32.0])) == pytest.approx([(1 - (1 - shares) ** 32).mean()], rel=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "2 numbers; the model has 48 experts"),
        ([[1] * 48, [1]], "layer 2: 1 numbers"),
        ([[1] * 48] * 3, "3 layers; the model has 56 with experts"),
        ([-1] + [1] * 47, "are -1; numbers of at least 0"),
        ([0] * 48, "are 0; numbers of at least 0 are needed, and one above it"),
        ({"a": 1}, "no numbers"),
    ],
)
def test_a_mistake_is_named(values: object, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_load(write(tmp_path, values), CONFIG)


def test_a_file_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        read_load(tmp_path / "none.json", CONFIG)
    file = tmp_path / "broken.json"
    file.write_text("[1,")
    with pytest.raises(ValueError, match="is not JSON"):
        read_load(file, CONFIG)
