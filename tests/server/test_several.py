"""The service over several processes: rank 0 answers as one process would, and clients are told of a lost rank."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import pytest

from step3_jax.launch.watch import LOST_PEER_CODE
from tests.launched import descendants, variable, wait_until_gone
from tests.server.running import Running, running

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WORDS = "serve --port 0 --no-warm-up --max-num-seqs 2 --max-model-len 1024 --max-num-batched-tokens 128"
SCHEMA = {"type": "object", "properties": {"n": {"enum": [12, 34]}}, "required": ["n"], "additionalProperties": False}


@contextlib.contextmanager
def launched(devices: str, words: str = WORDS) -> Iterator[Running]:
    command = f"-m step3_jax.cli.main launch --local 2 --grace 5 -- {words} {devices}"
    with running(command.split()) as server:
        ranks = ranks_of(server)
        server.wait_for("ready: ")
        yield server
        server.wait()
        wait_until_gone([*ranks.values()])


def ranks_of(server: Running) -> dict[int, int]:
    """The ranks' process ids."""
    found = {}
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if rank := variable(pid, "STEP3_PROCESS_ID"):
                found[int(rank)] = pid
    assert sorted(found) == [0, 1]
    return found


def ask(content: object = QUESTION, **more: object) -> dict[str, object]:
    return {"model": "step3-tiny", "messages": content, "temperature": 0, "max_tokens": 28} | more


def check_service(server: Running) -> None:
    """Answers, structured output, the prefix cache, abort, and an orderly end in the middle of an answer."""
    status, answer = server.ask(CHAT, ask())
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["message"]["content"]

    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    status, answer = server.ask(CHAT, ask(response_format=form))
    assert status == 200, answer
    assert json.loads(answer["choices"][0]["message"]["content"])["n"] in (12, 34)

    long = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 10}]
    used = [server.ask(CHAT, ask(long, max_tokens=4))[1]["usage"] for _ in range(2)]
    assert [one["prompt_tokens_details"]["cached_tokens"] >= 64 for one in used] == [False, True]

    gone = server.send(CHAT, ask(stream=True, max_tokens=900, ignore_eos=True))
    assert b"data:" in gone.getresponse().readline()
    gone.close()
    status, answer = server.ask(CHAT, ask())
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert server.metric("num_requests_running") == 0

    stream = server.begin(CHAT, ask(stream=True, max_tokens=50, ignore_eos=True))
    assert b"data:" in stream.readline()
    server.process.send_signal(signal.SIGTERM)
    text = stream.read().decode()
    assert '"finish_reason":"length"' in text
    assert text.rstrip().endswith("data: [DONE]")
    assert server.wait() == 0, server.said[-3000:]


def check_loss(server: Running, rank: int, number: signal.Signals, code: int) -> None:
    """A rank that dies in the middle of an answer: the client is told, and everything ends."""
    stream = server.begin(CHAT, ask(stream=True, max_tokens=900, ignore_eos=True))
    assert b"data:" in stream.readline()
    os.kill(ranks_of(server)[rank], number)
    assert '"error"' in stream.read().decode()
    assert server.wait() == code, server.said[-3000:]


@pytest.mark.slow  # It starts a service of two processes, which both compile.
def test_a_service_of_two_processes_answers_as_one_does() -> None:
    with launched("--tp 2") as server:
        check_service(server)


@pytest.mark.slow
def test_a_service_with_attention_and_ffn_apart_answers_as_one_does() -> None:
    with launched("--afd 1a1f") as server:
        check_service(server)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["--tp 2", "--afd 1a1f"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, 128 + signal.SIGKILL), (signal.SIGSTOP, LOST_PEER_CODE)],
    ids=["killed", "stopped"],
)
def test_clients_are_told_when_a_rank_is_lost(devices: str, number: signal.Signals, code: int) -> None:
    with launched(devices) as server:
        check_loss(server, 1, number, code)


@pytest.mark.slow
def test_a_rank_that_dies_while_nothing_is_to_be_done_ends_the_service() -> None:
    with launched("--tp 2") as server:
        os.kill(ranks_of(server)[1], signal.SIGKILL)
        assert server.wait() == 128 + signal.SIGKILL, server.said[-3000:]
        assert "the engine has stopped" in server.said
