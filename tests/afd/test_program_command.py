"""`step3 launch -- generate --afd`: two processes answer as one does, and whatever does not fit is refused."""

from __future__ import annotations

import json

import pytest

from tests.process import ROOT, step3


# tests/afd/test_program.py compares the tokens of two processes of a smaller model.
@pytest.mark.thorough
def test_two_processes_answer_as_one_does() -> None:
    picture = str(ROOT / "models" / "step3-tiny" / "examples" / "number-6267.png")
    words = ["generate", "--image", picture, "-p", "What number is this?", "--max-tokens", "24", "--json"]
    found = []
    for command in (words, ["launch", "--local", "2", "--", *words, "--afd", "1a1f"]):
        ran = step3(*command)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    fused, apart = found
    assert "6267" in fused["text"]
    assert apart["token_ids"] == fused["token_ids"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "generate -p x --afd 1a1f --afd-executor program",
            "this is one process: start it with step3 launch --local 2",
        ),
        (
            "launch --local 2 -- generate -p x --afd 1a1f --afd-executor host",
            "--afd-executor host runs 1a1f in one process, but there are 2",
        ),
        ("launch --local 2 -- afd trace --afd 1a1f", "start it without step3 launch"),
    ],
)
def test_what_does_not_fit_is_refused(words: str, message: str) -> None:
    ran = step3(*words.split())
    assert ran.returncode == 2
    assert message in ran.stderr
