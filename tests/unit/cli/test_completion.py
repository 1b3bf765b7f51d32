"""`step3 completion`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from step3_jax.cli import completion
from step3_jax.cli.main import COMMANDS, main

ASK = """
source /dev/stdin
COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_step3
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script() -> str:
    pytest.importorskip("shtab", reason="shtab is not installed: make test installs it")
    return completion.write_completion("bash")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [("step3 ''", set(COMMANDS)), ("step3 generate --max-to", {"--max-tokens"}), ("step3 plan me", {"memory"})],
)
def test_bash_completes_commands_and_options(words: str, found: set[str], script: str) -> None:
    command = ["bash", "-c", ASK.format(words=words)]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True, timeout=60)
    assert found <= set(done.stdout.split()), done.stderr


def test_without_its_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(completion.importlib.util, "find_spec", lambda _: None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'step3-jax[completion]'" in capsys.readouterr().err
