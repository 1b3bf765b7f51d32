"""The commands on several emulated devices answer as they do on one."""

from __future__ import annotations

import json
import os

import pytest

from tests.mesh.conftest import PROGRAMS
from tests.process import OPTIMISED, ROOT, step3

QUESTION = "What is the capital of France?"
IMAGE = "models/step3-tiny/examples/number-6267.png"


@pytest.mark.thorough
def test_generate_answers_about_an_image_as_on_one_device() -> None:
    """Compiled as for users, for four devices."""
    found = []
    for more in ([], ["--dp", "2", "--tp", "2"]):
        words = ["--image", IMAGE, "-p", "What number is this?", "--max-tokens", "16", "--json"]
        ran = step3("generate", *words, *more, **OPTIMISED)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1])["token_ids"])
    assert found[0] == found[1]


def test_chat_answers_on_two_devices() -> None:
    ran = step3("chat", "--dp", "2", "--max-tokens", "24", given=QUESTION + "\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Paris" in ran.stdout


# tests/mesh/test_processes.py compares the tokens of two processes of a smaller model.
@pytest.mark.thorough
def test_several_processes_show_the_answer_once() -> None:
    ran = step3("launch", "--local", "2", "--", "generate", "--dp", "2", "-p", QUESTION, "--max-tokens", "64")
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout
    assert "Paris" not in ran.stderr
    assert ran.stderr.count("tokens/s") == 1


def test_a_number_of_devices_that_does_not_divide_the_model_is_refused() -> None:
    ran = step3("generate", "-p", "x", "--dp", "5")
    assert ran.returncode == 2
    assert "The nearest that does: dp 6" in ran.stderr


# Two processes each, which compile.
@pytest.mark.slow
def test_chat_over_two_processes_answers_what_comes_on_standard_input() -> None:
    ran = step3("launch", "--local", "2", "--", "chat", "--tp", "2", "--max-tokens", "24", given=QUESTION + "\n")
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["--tp 2", "--afd 1a1f"])
def test_the_speed_of_two_processes_is_measured_by_rank_0(devices: str) -> None:
    words = (
        f"bench decode --preset tiny --batch 2 --rounds 1 --steps 4 --prompt 8 --prefill 16 --dtype float32 {devices}"
    )
    ran = step3("launch", "--local", "2", "--", *words.split())
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("prefill:") == 1


def test_several_processes_need_a_model_that_they_share() -> None:
    ran = step3("launch", "--local", "2", "--", "generate", "-p", "x")
    assert ran.returncode == 2
    assert "there are 2 processes, but the model is set to run on one device" in ran.stderr


# It compiles all programs in both processes.
@pytest.mark.slow
def test_a_script_runs_in_two_processes_and_compiles_nothing_after_its_warm_up() -> None:
    path = os.pathsep.join([str(ROOT), str(PROGRAMS)])
    ran = step3("launch", "--local", "2", "--module", "llm_script", PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    [found] = map(json.loads, ran.stdout.splitlines())
    assert "6267" in found["text"]
    assert found["warm"] == found["compiled"] > 0
