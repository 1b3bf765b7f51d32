"""Lengths, prompts and the tokenizer of random models."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.bench.workload import Lengths, draw_lengths, random_prompts, read_lengths, word_tokenizer


def test_lengths_fill_their_ranges_and_repeat_with_the_seed():
    lengths = draw_lengths(300, (3, 5), (7, 7), seed=1)
    assert {one.prompt for one in lengths} == {3, 4, 5}
    assert {one.output for one in lengths} == {7}
    assert lengths == draw_lengths(300, (3, 5), (7, 7), seed=1) != draw_lengths(300, (3, 5), (7, 7), seed=2)


@pytest.mark.parametrize(("count", "prompt", "output"), [(0, (1, 2), (1, 2)), (1, (2, 1), (1, 2)), (1, (1, 2), (0, 2))])
def test_an_empty_range_is_refused(count, prompt, output):
    with pytest.raises(ValueError, match="needed"):
        draw_lengths(count, prompt, output)


def test_lengths_of_a_file_are_those_of_its_lines(tmp_path: pathlib.Path):
    file = tmp_path / "lengths.jsonl"
    lines = [{"prompt_tokens": 3, "output_tokens": 9, "model": "x"}, {"prompt_tokens": 1, "output_tokens": 1}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_lengths(file) == [Lengths(3, 9), Lengths(1, 1)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "x",
        "[1, 2]",
        '{"prompt_tokens": 3}',
        '{"prompt_tokens": 0, "output_tokens": 1}',
        '{"prompt_tokens": true, "output_tokens": 1}',
    ],
)
def test_a_line_of_another_form_is_named(line, tmp_path: pathlib.Path):
    file = tmp_path / "lengths.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=r"lengths\.jsonl"):
        read_lengths(file)


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read"):
        read_lengths(tmp_path / "none.jsonl")


def test_prompts_have_their_lengths_and_differ_by_the_seed():
    lengths = [Lengths(5, 1), Lengths(9, 1)]
    first, second = (random_prompts(lengths, 61, seed=seed) for seed in (0, 1))
    assert [len(ids) for ids in first] == [5, 9]
    assert first != second
    assert all(2 <= token < 61 for ids in first for token in ids)


def test_every_id_is_a_word_of_its_own():
    tokenizer = word_tokenizer(700)
    words = [tokenizer.decode([token]) for token in range(700)]
    assert len(set(words)) == 700
    assert tokenizer.decode([3, 699, 0]) == words[3] + words[699] + words[0]
