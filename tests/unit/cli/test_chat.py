"""`step3 chat` over a pipe, on a small model with random weights."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import pytest

from step3_jax.cli.chat import Conversation
from step3_jax.cli.main import main
from step3_jax.cli.talk import find_pasted_path
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams

pytestmark = pytest.mark.usefixtures("private_compile_cache")


@pytest.fixture
def talk(random_model_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Pipes lines into `step3 chat`; returns exit code, stdout and stderr."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", str(random_model_path), "--max-tokens", "4", "--ignore-eos", *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_question_gets_an_answer_until_the_input_ends(talk) -> None:
    code, out, err = talk("Hello?", "", "And you?")
    assert (code, err) == (0, "(cut off inside the reasoning by --max-tokens)\n" * 2)
    assert out.count("\n") == 2, "one line an answer: these are empty, as random weights never end their reasoning"


def test_quit_leaves_at_once(talk) -> None:
    assert talk("/quit", "Hello?") == (0, "", "")


def test_reasoning_is_shown_when_asked_for(talk) -> None:
    assert talk("Hello?", options=("--reasoning",))[2].strip()


def test_a_mistake_does_not_end_the_conversation_but_shows_in_the_code(talk) -> None:
    code, out, err = talk("/imagine a dog", "/image no-such-file.png", "Hello?")
    assert code == 2
    assert out == "\n"
    assert [line.startswith("step3: error: ") for line in err.splitlines()] == [True, True, False]


@pytest.fixture(scope="module")
def conversation(random_model_path: pathlib.Path) -> Conversation:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    llm = LLM(random_model_path)
    return Conversation(llm, random_model_path, params, system="Be brief.", show_reasoning=False)


def test_history_holds_what_was_said_until_reset(conversation: Conversation, picture: pathlib.Path) -> None:
    for line in ("One?", f"/image {picture}", "Two?"):
        conversation.take(line)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[3]["content"][0] == {"type": "image", "image": str(picture)}
    conversation.take("/reset")
    assert [message["role"] for message in conversation.messages] == ["system"]


def test_a_refused_question_leaves_the_history_alone(conversation: Conversation) -> None:
    conversation.take("/reset")
    conversation.take("One?")
    before = conversation.messages
    with pytest.raises(ValueError, match="max_model_len"):
        conversation.take("word " * 5000)
    assert conversation.messages == before


def test_a_byte_order_mark_is_no_part_of_the_first_line(talk) -> None:
    assert talk("\ufeff/quit") == (0, "", "")


@pytest.mark.parametrize(
    "pasted",
    [
        '"{}"',
        "'{}'",
        "{}",
        "  {}  ",
        lambda path: path.replace(" ", "\\ "),
        lambda path: "file://" + path.replace(" ", "%20"),
    ],
)
def test_an_image_may_be_pasted_as_terminals_do(pasted, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "my guitar.png")
    pathlib.Path(path).touch()
    assert find_pasted_path(pasted.format(path) if isinstance(pasted, str) else pasted(path)) == path


@pytest.mark.parametrize("name", ["it's.png", '"quoted".png', "a\\b.png"])
def test_a_name_that_exists_as_it_stands_is_taken(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).touch()
    assert find_pasted_path(str(tmp_path / name)) == str(tmp_path / name)


def test_a_full_conversation_goes_on_without_its_oldest_turns(
    random_model_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm = LLM(random_model_path, max_model_len=192)
    talk = Conversation(llm, random_model_path, params, system="Be brief.", show_reasoning=False)
    for number in range(12):
        talk.take(f"Question number {number}, in a few words?")
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert 0 < len(roles) // 2 < 12
    assert talk.messages[-2]["content"] == "Question number 11, in a few words?"
    said = capsys.readouterr().err
    assert "the conversation is full, 192 tokens: the oldest turn was left out; /reset starts over" in said


def test_an_image_is_refused_by_a_model_without_a_vision_tower(
    random_model_path: pathlib.Path, picture: pathlib.Path, monkeypatch: pytest.MonkeyPatch, conversation: Conversation
) -> None:
    monkeypatch.setattr(conversation._llm, "config", dataclasses.replace(conversation._llm.config, vision=None))
    with pytest.raises(ValueError, match="no vision tower"):
        conversation.take(f"/image {picture}")
