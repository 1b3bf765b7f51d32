"""Every example in README and docs runs unchanged, or says why it is not run."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

import pytest

from step3_jax.cli.main import build_parser
from tests.docs.examples import FILES, ROOT, Example, read_examples
from tests.process import environment

EXAMPLES = [example for file in FILES for example in read_examples(file)]
SHELL = [one for one in EXAMPLES if one.language == "sh"]
PYTHON = [one for one in EXAMPLES if one.language == "python"]
# As many devices as the largest example asks for: their number is fixed as soon as JAX computes anything.
CPU_DEVICES = "4"


def run_all(kind: str, folder: pathlib.Path) -> None:
    """Runs the examples of a kind in one process, in a folder that looks like a checkout and receives what they write."""
    for name in ("models", "configs"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "examples.py"), kind],
        cwd=folder,
        env=environment(STEP3_CPU_DEVICES=CPU_DEVICES),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.thorough
def test_the_examples_run(tmp_path: pathlib.Path) -> None:
    run_all("fast", tmp_path)


@pytest.mark.slow
def test_the_examples_that_take_longer_run(tmp_path: pathlib.Path) -> None:
    run_all("slow", tmp_path)


def test_every_mark_has_a_known_form() -> None:
    wrong = [f"{one}: {one.mark}" for one in EXAMPLES if one.mark is not None and one.kind == "fast"]
    assert not wrong, "neither 'not run: why' nor 'slow: why'"


@pytest.mark.parametrize("example", SHELL, ids=str)
def test_the_options_of_every_command_exist(example: Example) -> None:
    for words in example.commands:
        if "step3" not in words:
            continue
        command, *rest = words[words.index("step3") + 1 :]
        if command == "launch":
            rest, (command, *others) = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
            assert isinstance(build_parser("launch").parse_args(["launch", *rest]), argparse.Namespace)
            rest = others
        # What the shell does with the output.
        rest = rest[: rest.index(">")] if ">" in rest else rest
        # What the reader has to fill in.
        rest = [word for word in rest if word != "..."]
        if command == "generate" and "-p" not in rest:
            rest += ["-p", "Hello"]
        if rest[-1:] == ["-p"]:
            rest.append("Hello")
        assert isinstance(build_parser(command).parse_args([command, *rest]), argparse.Namespace)


@pytest.mark.parametrize("example", PYTHON, ids=str)
def test_every_python_example_is_python(example: Example) -> None:
    compile(example.text, example.file, "exec")
