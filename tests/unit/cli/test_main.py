"""The command line's framework: help, one-line mistakes, exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from step3_jax import __version__
from step3_jax.cli import env, main


@pytest.mark.parametrize(
    "words",
    [(), *((command,) for command in main.COMMANDS), ("plan", "memory"), ("bench", "decode"), ("bench", "serve")],
)
def test_help_does_not_import_jax(words: tuple[str, ...]) -> None:
    program = (
        f"import sys; from step3_jax.cli.main import main; code = main([*{words}, '--help']); "
        "slow = {'jax', 'flax', 'numpy'} & set(sys.modules); sys.exit(f'imported {slow}' if slow else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " ".join(("step3", *words)) in done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in main.COMMANDS)


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
        (KeyboardInterrupt(), 130, "step3: interrupted\n"),
        (KeyboardInterrupt("interrupted; go on"), 130, "step3: interrupted; go on\n"),
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


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "generate -p x --max-new-tokens 3",
            "no option --max-new-tokens, did you mean --max-tokens? (see step3 generate",
        ),
        ("plan memory 2a2f --hardwar2=x", "has no option --hardwar2, did you mean --hardware? (see step3 plan memory"),
        ("bench decode --zzz", "step3 bench decode has no option --zzz (see step3 bench decode"),
        (
            "launch --local 2 generate -p hi",
            "-p is not an option of step3 launch: the command to start comes after --",
        ),
        ("inspect a b", "'b' is an unexpected argument (see step3 inspect"),
    ],
)
def test_a_word_too_many_is_answered_by_the_command_that_it_was_given_to(
    argv: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(argv.split()) == 2
    assert said in capsys.readouterr().err
