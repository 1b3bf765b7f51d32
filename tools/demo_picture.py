"""Draws what `make demo` prints, with the images it asks about: the picture in the README.

    python -m tools.demo_picture docs/demo.svg

The questions are asked, not copied: the answers are those of the shipped model at this commit.
"""

from __future__ import annotations

import argparse
import base64
import html
import pathlib
import sys

from step3_jax import resources
from step3_jax.cli.choice import DEFAULT_MODEL
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.llm import LLM
from tools.demo import Example, ask, command_of, read_examples

# One of each kind: a number, a drawing, a fact, by the file that the question is about.
SHOWN = ("number-6267.png", "guitar.png", None)
_WIDTH, _LINE, _MARGIN, _IMAGE = 860, 21, 20, 52
_STYLE = (
    "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#c9d1d9;white-space:pre}"
    ".command{fill:#7ee787}.label{fill:#8b949e}"
)


def choose(examples: list[Example]) -> list[Example]:
    """One question for each of `SHOWN`; the first without an image stands for None."""
    names = [None if example.image is None else example.image.name for example in examples]
    return [examples[names.index(name)] for name in SHOWN]


def draw(answered: list[tuple[Example, str]]) -> str:
    """The picture.

    Args:
      answered: Questions with the model's answers.

    Returns:
      SVG with the images inside, so that it needs no other file.
    """
    parts: list[str] = []
    y = _MARGIN
    for example, answer in answered:
        lines = [("command", f"$ {command_of(example)}"), ("", f"  answered  {answer}")]
        if example.answer is not None:
            lines.append(("label", f"  expected  {example.answer}"))
        for number, (kind, text) in enumerate(lines):
            parts.append(f'<text class="{kind}" x="{_MARGIN}" y="{y + 15 + number * _LINE}">{html.escape(text)}</text>')
        if example.image is not None:
            data = base64.b64encode(example.image.read_bytes()).decode()
            x = _WIDTH - _MARGIN - _IMAGE
            parts.append(
                f'<image x="{x}" y="{y + _LINE}" width="{_IMAGE}" height="{_IMAGE}" href="data:image/png;base64,{data}"/>'
            )
        y += len(lines) * _LINE + 24
    height = y
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">\n'
        f"<title>What make demo prints</title>\n<style>{_STYLE}</style>\n"
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#0d1117"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> int:
    """Asks and draws."""
    parser = argparse.ArgumentParser(description="Draw what make demo prints.")
    parser.add_argument("out", type=pathlib.Path, metavar="FILE.svg")
    out = parser.parse_args().out
    folder = resources.find(DEFAULT_MODEL)
    enable_compile_cache()
    llm = LLM(folder)
    examples = choose(read_examples(folder / "examples"))
    out.write_text(draw([(example, ask(llm, folder, example)) for example in examples]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
