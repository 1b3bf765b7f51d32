"""`step3 chat --url` against a service with scripted answers."""

from __future__ import annotations

import base64
import io
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from step3_jax.cli.main import main
from tests.process import environment
from tests.server.stand_in import StandIn, serve

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[StandIn, str]]:
    service = StandIn()
    with serve(service.app()) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StandIn, str]) -> StandIn:
    running[0].__init__()  # type: ignore[misc]
    return running[0]


@pytest.fixture
def talk(
    running: tuple[StandIn, str],
    service: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Talk:
    """Pipes lines into the command; returns exit code, stdout and stderr."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", "--url", running[1], *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_conversation_is_shown_and_sent_as_a_local_one(talk: Talk, service: StandIn) -> None:
    assert talk("One?", "Two?", options=("--reasoning", "--system", "Be brief.")) == (
        0,
        "It is a dog.\n" * 2,
        "Let me see.\n" * 2,
    )
    assert service.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "It is a dog."},
        {"role": "user", "content": "Two?"},
    ]


def test_options_are_sent_and_extensions_only_where_given(talk: Talk, service: StandIn) -> None:
    talk("Hi")
    assert set(service.bodies[0]) == {"model", "max_tokens", "temperature", "top_p", "messages", "stream"}
    talk("Hi", options=("--top-k", "5", "--seed", "7", "--stop", "x", "--temperature", "0.5", "--max-tokens", "9"))
    sent = service.bodies[1]
    assert [sent[name] for name in ("top_k", "seed", "stop", "temperature", "max_tokens")] == [5, 7, ["x"], 0.5, 9]
    assert sent["model"] == "stand-in"


@pytest.mark.parametrize(("form", "kind"), [("PNG", "png"), ("WEBP", "webp"), ("BMP", "jpeg")])
def test_an_image_file_is_sent_as_a_data_url_in_front_of_the_text(
    form: str, kind: str, talk: Talk, service: StandIn, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / f"a.{form.lower()}"
    Image.new("RGB", (20, 10), "red").save(path)
    assert talk(f"/image {path}", "What?")[0] == 0
    image, text = service.bodies[0]["messages"][0]["content"]  # type: ignore[index]
    assert text == {"type": "text", "text": "What?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == f"data:image/{kind};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (20, 10)
    if form != "BMP":
        assert base64.b64decode(data) == path.read_bytes()


def test_a_service_that_fails_is_told_and_the_conversation_goes_on(talk: Talk, service: StandIn) -> None:
    service.status, service.message = 503, "The queue is full."
    code, out, err = talk("One?", "Two?")
    assert (code, out.strip()) == (1, "")
    assert err.count("step3: error: the service answers 503: The queue is full.\n") == 2
    service.status, service.is_broken = 200, True
    code, out, err = talk("One?")
    assert (code, out) == (1, "It is a dog.\n")
    assert err == "step3: error: the service ended the answer: The queue is full.\n"


def test_what_came_of_a_broken_answer_stays_in_the_conversation(talk: Talk, service: StandIn) -> None:
    service.is_cut = True
    talk("One?", "Two?")
    assert [message["content"] for message in service.bodies[1]["messages"]] == [  # type: ignore[attr-defined]
        "One?",
        "It is a dog.",
        "Two?",
    ]


def test_a_cut_off_answer_is_told(talk: Talk, service: StandIn) -> None:
    service.finish_reason = "length"
    assert talk("One?")[2] == "(cut off by --max-tokens or the end of the context)\n"


def test_the_key_is_needed(talk: Talk, service: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    service.key = "secret"
    code, _, err = talk("One?")
    assert code == 1
    assert "401: This server needs a key" in err
    monkeypatch.setenv("STEP3_API_KEY", "secret")
    assert talk("One?")[:2] == (0, "It is a dog.\n")


def test_a_model_and_a_service_are_one_too_many(talk: Talk) -> None:
    code, _, err = talk(options=("models/step3-tiny",))
    assert code == 2
    assert "give one of them" in err


def test_no_jax_is_imported(running: tuple[StandIn, str], service: StandIn) -> None:
    program = (
        "import sys; from step3_jax.cli.main import main; "
        f"code = main(['chat', '--url', '{running[1]}']); "
        "sys.exit('imported jax' if 'jax' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        input="Hi\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "It is a dog.\n"), done.stderr
