"""`step3 bench serve` against a service with scripted answers."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from step3_jax.bench.serve import TARGETS
from step3_jax.cli.arguments import bench_serve
from step3_jax.cli.main import main
from tests.process import environment
from tests.server.stand_in import StandIn, serve


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[StandIn, str]]:
    service = StandIn()
    with serve(service.app()) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StandIn, str]) -> StandIn:
    running[0].__init__()  # type: ignore[misc]
    return running[0]


def bench(url: str, *words: str) -> int:
    return main(["bench", "serve", "--url", url, "--requests", "5", *words])


def test_figures_are_printed_and_kept(
    running: tuple[StandIn, str], service: StandIn, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench(running[1], "--concurrency", "2", "--goodput", "ttft:60000,e2e:60000", "--json", str(file)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "| first token |" in printed.out
    found = json.loads(file.read_text(encoding="utf-8"))["serve"]
    assert (found["requests"], found["answered"], found["good_share"]) == (5, 5, 1.0)
    assert found["conditions"]["model"] == "stand-in"
    assert len(service.bodies) == 7, "two of the warm-up are not counted"
    body = service.bodies[0]
    assert (body["model"], body["ignore_eos"], body["temperature"]) == ("stand-in", True, 0)


def test_a_dataset_is_sent_as_often_as_needed(
    running: tuple[StandIn, str], service: StandIn, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 3}\n{"prompt": "b"}\n', encoding="utf-8")
    options = ("--rate", "500", "--endpoint", "completions", "--dataset", str(file), "--warm-up", "0")
    assert bench(running[1], *options, "--extra-body", "{}") == 0
    assert sorted(str(body["prompt"]) for body in service.bodies) == ["a", "a", "a", "b", "b"]
    assert [body.get("max_tokens") for body in service.bodies if body["prompt"] == "b"] == [None, None]


def test_the_key_is_of_the_option_or_of_its_own_variable(
    running: tuple[StandIn, str],
    service: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service.key = "secret"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert bench(running[1]) == 1
    assert "401" in capsys.readouterr().err
    assert bench(running[1], "--api-key", "secret") == 0
    monkeypatch.setenv("STEP3_API_KEY", "secret")
    assert bench(running[1]) == 0
    assert "secret" not in capsys.readouterr().out


def test_a_service_that_refuses_is_told_with_its_reason(
    running: tuple[StandIn, str], service: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    service.status, service.message = 400, "max_tokens is too large."
    assert bench(running[1]) == 1
    assert "answers 400: max_tokens is too large." in capsys.readouterr().err
    assert bench(running[1], "--warm-up", "0") == 1
    assert "errors: {400: 5}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rate", "1", "--concurrency", "2"), "not allowed with"),
        (("--rate", "-1"), "more than 0"),
        (("--concurrency", "0"), "at least 1"),
        (("--goodput", "speed:3"), "such as ttft:500"),
        (("--extra-body", "[1]"), "a JSON object is needed"),
        (("--dataset", "no-such-file"), "no-such-file cannot be read"),
        (("--url", "nonsense"), "such as http://127.0.0.1:8000"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:1", *words) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_plot_without_its_library_is_refused_before_the_load(
    running: tuple[StandIn, str],
    service: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find_spec(name, *more)
    )
    assert bench(running[1], "--plot", "waits.png") == 2
    assert "pip install 'step3-jax[plot]'" in capsys.readouterr().err
    assert service.bodies == []


def test_names_of_targets_are_the_same_in_options_and_figures() -> None:
    assert tuple(TARGETS) == bench_serve.TARGETS


def test_no_device_and_no_jax_is_touched(running: tuple[StandIn, str], service: StandIn) -> None:
    program = (
        "import sys; from step3_jax.cli.main import main; "
        f"code = main(['bench', 'serve', '--url', '{running[1]}', '--requests', '3']); "
        "sys.exit('imported jax' if 'jax' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
