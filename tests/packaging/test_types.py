"""Types from outside: a program that uses the package is checked by type checkers, strictly."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.process import ROOT, environment

CONSUMER = ROOT / "tests" / "packaging" / "programs" / "consumer.py"
# Each checker reads JAX first.
pytestmark = pytest.mark.slow


@pytest.fixture
def outside(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with only the program: none of our configuration is near."""
    shutil.copy(CONSUMER, tmp_path)
    return tmp_path


def check(folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, CONSUMER.name],
        cwd=folder,
        env=environment(MYPYPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_mypy_finds_no_mistake_in_a_program_that_uses_the_package(outside: pathlib.Path) -> None:
    done = check(outside, sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(outside / "cache"))
    assert done.returncode == 0, done.stdout


def test_mypy_sees_a_mistake(outside: pathlib.Path) -> None:
    program = outside / CONSUMER.name
    program.write_text(
        program.read_text(encoding="utf-8").replace("max_tokens=16", 'max_tokens="16"'), encoding="utf-8"
    )
    done = check(outside, sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(outside / "cache"))
    assert done.returncode == 1
    assert 'Argument "max_tokens"' in done.stdout


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed (npm install --global pyright)")
def test_pyright_finds_no_mistake_in_a_program_that_uses_the_package(outside: pathlib.Path) -> None:
    done = check(outside, "pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout
