"""The measurement of what a structured output costs a stream next to it."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools.bench_structured import SIDES, main, piece_tokenizer


def test_pieces_have_every_byte_and_an_end() -> None:
    tokenizer = piece_tokenizer(700)
    assert tokenizer.num_ids == 700
    assert tokenizer.eos_ids == (699,)
    assert tokenizer.decode(tokenizer.encode('{"é": 1}')) == '{"é": 1}'
    assert len({tokenizer.decode([token]) for token in range(300, 699)}) == 399


@pytest.mark.slow
def test_all_sides_are_measured(tmp_path: pathlib.Path) -> None:
    """It compiles the programs of two engines."""
    path = tmp_path / "found.json"
    assert main(["--preset", "tiny", "--vocab", "700", "--tokens", "12", "--rounds", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    for one in found["structured"]:
        assert set(one["tokens_per_s"]) == set(SIDES)
        assert one["kept_of_beside_free"] > 0
