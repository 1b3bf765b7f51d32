"""The command line's frame: help, mistakes in one line, exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from step3_jax import __version__
from step3_jax.cli import env, main


def test_help_names_every_command_and_does_not_import_jax() -> None:
    program = (
        "import sys; from step3_jax.cli.main import main; code = main(['--help']); "
        "slow = {'jax', 'flax', 'numpy'} & set(sys.modules); sys.exit(f'imported {slow}' if slow else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in main.COMMANDS)


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, "--help"]) == 0
    assert f"step3 {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"step3-jax {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["env", "--no-such-option"], ["env", "too-much"]])
def test_a_mistake_is_one_line_and_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("step3: error: ")
    assert printed.err.count("\n") == 1
    assert "--help" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "step3: error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "dog.png"), 2, "step3: error: dog.png: No such file"),
        (RuntimeError("out of memory"), 1, "step3: error: RuntimeError: out of memory (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(env, "run", fail)
    assert main.main(["env"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert "Traceback" not in printed


@pytest.mark.parametrize("argv", [["--debug", "env"], ["env", "--debug"]])
def test_debug_shows_where(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ValueError("some mistake")

    monkeypatch.setattr(env, "run", fail)
    assert main.main(argv) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("step3: error: some mistake\n")
