"""`step3 generate`, on a small model with random weights."""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import shutil

import numpy as np
import pytest

from step3_jax.checkpoint.names import is_vision_tensor
from step3_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from step3_jax.cli import generate
from step3_jax.cli.choice import find_model
from step3_jax.cli.main import build_parser, main

FIELDS = {
    "model",
    "text",
    "reasoning",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "time_to_first_token_s",
    "tokens_per_second",
    "load_s",
}

pytestmark = pytest.mark.usefixtures("private_compile_cache")


@pytest.fixture
def ask(random_model_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    """Runs `step3 generate` with the random model; returns the object of --json."""

    def run(*options: str) -> dict:
        assert main(["generate", str(random_model_path), "--json", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1, "nothing but the object may stand on stdout"
        return json.loads(lines[-1])

    return run


def test_json_has_every_field_and_greedy_is_the_default(ask, random_model_path: pathlib.Path) -> None:
    first, again = (ask("-p", "What is a dog?", "--max-tokens", "6", "--ignore-eos") for _ in range(2))
    assert first.keys() >= FIELDS
    assert first["model"] == str(random_model_path)
    assert first["finish_reason"] == "length"
    assert first["completion_tokens"] == len(first["token_ids"]) == 6
    assert first["token_ids"] == again["token_ids"]
    assert first["text"] == "", "the template begins the output with reasoning, and random weights do not end it"
    assert first["load_s"] > 0


def test_pictures_take_places_in_the_prompt(ask, picture: pathlib.Path) -> None:
    bare, seen = (ask("-p", "What?", "--max-tokens", "2", *extra) for extra in ((), ("--image", str(picture))))
    assert seen["prompt_tokens"] > bare["prompt_tokens"]


def test_raw_gives_the_prompt_as_it_is_and_all_output_is_text(ask) -> None:
    raw = ask("--raw", "-p", "a dog", "--max-tokens", "4", "--ignore-eos")
    assert raw["reasoning"] == ""
    assert raw["prompt_tokens"] < ask("-p", "a dog", "--max-tokens", "1")["prompt_tokens"]


def test_a_prompt_comes_from_stdin(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a dog?"))
    piped = ask("-p", "-", "--max-tokens", "3", "--ignore-eos")
    assert piped["token_ids"] == ask("-p", "What is a dog?", "--max-tokens", "3", "--ignore-eos")["token_ids"]


def test_sampled_answers_come_with_the_seed_that_repeats_them(ask) -> None:
    options = ("-p", "Say", "--max-tokens", "3", "--ignore-eos", "--n", "2", "--temperature", "2", "--logprobs", "2")
    found = ask(*options)
    assert len(found["outputs"]) == 2
    assert found["outputs"][0]["token_ids"] == found["token_ids"]
    assert found["completion_tokens"] == 6
    assert [entry["token_id"] for entry in found["logprobs"]] == found["token_ids"]
    assert all(entry["logprob"] <= 0 and len(entry["top"]) >= 2 for entry in found["logprobs"])
    again = ask(*options, "--seed", str(found["seed"]))
    assert [one["token_ids"] for one in again["outputs"]] == [one["token_ids"] for one in found["outputs"]]


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_text_goes_to_stdout_and_notes_to_stderr(
    stream: str, random_model_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Text after </think> in the prompt, so that all output is the answer.
    options = ["--raw", "-p", "<think>a</think>", "--max-tokens", "5", "--ignore-eos"]
    assert main(["generate", str(random_model_path), *options, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    assert main(["generate", str(random_model_path), *options, stream]) == 0
    printed = capsys.readouterr()
    assert printed.out == whole + "\n"
    assert "5 tokens" in printed.err
    assert "cut off by --max-tokens" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "no-such-file.png"], "no-such-file.png"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--max-tokens", "many"], "invalid int value"),
        (["--logprobs", "2"], "--json"),
        (["--json", "--stream"], "--stream"),
        (["--raw", "--system", "Be brief."], "--system"),
        (["--n", "2"], "n is 2"),
        (["--dtype", "int8"], "invalid choice"),
        (["--kv-cache-dtype", "fp4"], "invalid choice"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens is 0"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    options: list[str], message: str, random_model_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(random_model_path), "-p", "What?", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_a_model_that_is_no_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "stepfun-ai/step3", "-p", "What?"]) == 2
    assert "stepfun-ai/step3" in capsys.readouterr().err


@pytest.fixture
def text_only_path(random_model_path: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The model without its vision tower's weights; its configuration still has one."""
    folder = shutil.copytree(random_model_path, tmp_path / "text-only")
    file = SafetensorsFile(random_model_path / "model.safetensors")
    kept = [(name, np.array(file.read(name))) for name in file.tensors if not is_vision_tensor(name)]
    file.close()
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", kept)
    return folder


def test_what_the_model_cannot_do_is_told_before_it_is_loaded(
    random_model_path: pathlib.Path,
    text_only_path: pathlib.Path,
    picture: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the weights are being loaded")

    monkeypatch.setattr(generate, "load_llm", refuse)
    bare = shutil.copytree(text_only_path, text_only_path.parent / "bare")
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    for folder, options, said in (
        (random_model_path, ["--max-model-len", "100000"], "--max-model-len 100000: "),
        (text_only_path, ["--image", str(picture)], "is a text-only model"),
        (bare, [], "has no chat template"),
    ):
        assert main(["generate", str(folder), "-p", "x", *options]) == 2
        assert said in capsys.readouterr().err


def test_stop_strings_end_the_answer_and_not_the_reasoning(tiny_model_path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> dict:
        assert main(["generate", str(tiny_model_path), "--json", "-p", "What is a violin?", *options]) == 0
        return json.loads(capsys.readouterr().out)

    whole = answer()
    word = next(word for word in whole["reasoning"].split() if word not in whole["text"])
    assert answer("--stop", word)["text"] == whole["text"]
    last = whole["text"].split()[-1]
    stopped = answer("--stop", last)
    assert (stopped["reasoning"], stopped["stop_reason"]) == (whole["reasoning"], last)
    assert stopped["text"] == whole["text"].partition(last)[0].strip()


def test_a_shipped_model_is_found_by_its_name_from_anywhere(
    tiny_model_path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, ask
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(argparse.Namespace(model="models/step3-tiny")) == tiny_model_path


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "BF16"])
def test_dtypes_have_the_same_names_everywhere(name: str) -> None:
    for command, right in (("generate -p x --dtype", "bfloat16"), ("convert a b --dtype", "bf16")):
        words = [*command.split(), name]
        assert build_parser(words[0]).parse_args(words).dtype == right
