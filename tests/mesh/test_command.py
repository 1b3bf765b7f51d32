"""The commands on several emulated devices answer as they do on one."""

from __future__ import annotations

import json

from tests.process import step3

QUESTION = "What is the capital of France?"
IMAGE = "models/step3-tiny/examples/number-6267.png"


def test_generate_answers_about_an_image_as_on_one_device() -> None:
    found = []
    for more in ([], ["--dp", "2", "--tp", "2"]):
        words = ["--image", IMAGE, "-p", "What number is this?", "--max-tokens", "16", "--json"]
        ran = step3("generate", *words, *more)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1])["token_ids"])
    assert found[0] == found[1]


def test_chat_answers_on_two_devices() -> None:
    ran = step3("chat", "--dp", "2", "--max-tokens", "24", given=QUESTION + "\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Paris" in ran.stdout


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
