"""The picture of the README."""

from __future__ import annotations

import xml.etree.ElementTree as xml

import pytest

from step3_jax import resources
from tests.process import ROOT
from tools.demo import Example, command_of, read_examples
from tools.demo_picture import choose, draw

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def shown() -> list[Example]:
    return choose(read_examples(resources.find("models/step3-tiny") / "examples"))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in xml.fromstring(svg).iter(f"{NAMESPACE}text")]


def test_it_shows_questions_answers_and_images(shown: list[Example]) -> None:
    svg = draw([(example, f"<answer {number}>") for number, example in enumerate(shown)])
    lines = texts(svg)
    for number, example in enumerate(shown):
        assert f"$ {command_of(example)}" in lines
        assert f"  answered  <answer {number}>" in lines
    assert svg.count("data:image/png;base64,") == sum(example.image is not None for example in shown)


def test_the_shipped_one_shows_todays_questions_with_right_answers(shown: list[Example]) -> None:
    lines = texts((ROOT / "docs" / "demo.svg").read_text(encoding="utf-8"))
    for example in shown:
        assert any(example.prompt in line for line in lines)
        assert f"  answered  {example.answer}" in lines
