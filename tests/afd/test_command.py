"""The commands: `--afd` runs out of the box, and mistakes are reported before anything is loaded."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.cli.main import main
from tests.process import step3


@pytest.mark.slow  # The command runs in the tests of docs, and test_host.py compares the tokens.
def test_generate_answers_as_the_fused_model_does() -> None:
    words = ["generate", "-p", "What is the capital of France?", "--max-tokens", "24", "--json"]
    found = []
    for more in ([], ["--afd", "2a2f"]):
        ran = step3(*words, *more)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    fused, apart = found
    assert "Paris" in fused["text"]
    assert apart["token_ids"] == fused["token_ids"]


@pytest.mark.slow  # The command runs in the tests of docs, and test_trace.py draws.
def test_a_timeline_is_drawn(tmp_path: pathlib.Path) -> None:
    words = ["afd", "trace", "--preset", "tiny", "--batch", "4", "--max-tokens", "3", "--afd-microbatches", "2"]
    ran = step3(*words, "--out", "trace.json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "efficiency" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afd.svg", "trace.json"]
    (tmp_path / "afd.svg").unlink()
    again = step3("afd", "trace", "--from", "trace.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "afd.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--afd", "2a"], "xAyF, such as 1a1f or 2a2f"),
        (["--afd-payload", "fp8"], "--afd-payload is for attention and FFN on separate devices: add --afd"),
        (["--afd", "2a2f", "--afd-microbatches", "5"], "allowed: 1 to 4"),
        (
            ["--afd", "2a2f", "--dp", "2"],
            "--data-parallel-size and --attention-parallelism cannot be combined with --afd",
        ),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "x", *words]) == 2
    assert message in capsys.readouterr().err


# In processes of their own, which look like as many devices as are wanted.
def test_experts_that_the_devices_do_not_divide_are_told() -> None:
    ran = step3("generate", "-p", "x", "--afd", "1a5f")
    assert ran.returncode == 2
    assert "moe_num_experts is 24, which ep = 5 does not cut into equal parts" in ran.stderr


def test_devices_that_are_too_few_are_counted() -> None:
    ran = step3("generate", "-p", "x", "--afd", "2a2f", STEP3_CPU_DEVICES="2")
    assert ran.returncode == 2
    assert "needs 4 devices, and there are 2 (cpu): 1a1f fits" in ran.stderr
