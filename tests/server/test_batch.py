"""Batches answered by the service's own application: every request once, errors as lines, resuming after a stop."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.engine.core import EngineCore
from step3_jax.server.batch import BatchStopped, run_batch
from step3_jax.server.batch_file import BatchInput, BatchOutput
from tests.server.client import Client
from tests.server.conftest import NAME, Open


def chat(number: int, **values: object) -> dict[str, object]:
    body = {"messages": [{"role": "user", "content": f"SAY </think>answer {number}"}], "max_tokens": 50} | values
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    entries = [chat(number) for number in range(20)]
    entries += [
        chat(20, n=2),
        chat(21, temperature="hot"),
        chat(22, model="another"),
        {"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "SAY yes", "max_tokens": 9, "model": NAME}},
        {"custom_id": "response", "url": "/v1/responses", "body": {"input": "SAY </think>fine", "store": False}},
    ]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return given, tmp_path / "out.jsonl"


def run(client: Client, files: tuple[pathlib.Path, pathlib.Path], concurrency: int = 6) -> tuple[int, list[int]]:
    given, output, told = BatchInput(files[0]), BatchOutput(files[1]), []
    try:
        return client.run(run_batch(client.app, given, output, concurrency=concurrency, tell=told.append)), told
    finally:
        given.close()
        output.close()


def read(path: pathlib.Path) -> dict[str, dict[str, object]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    found = {entry["custom_id"]: entry["response"] for entry in entries}
    assert len(found) == len(entries), "a request has two answers"
    return found


def test_every_request_is_answered_once_and_errors_are_answers(
    client: Client, files: tuple[pathlib.Path, pathlib.Path]
) -> None:
    num_errors, told = run(client, files)
    assert (num_errors, sorted(told)) == (2, [200] * 23 + [400, 404])
    found = read(files[1])
    assert len(found) == 25
    for number in range(20):
        assert found[f"r{number}"]["status_code"] == 200
        assert found[f"r{number}"]["body"]["choices"][0]["message"]["content"] == f"answer {number}"  # type: ignore[index]
    assert len(found["r20"]["body"]["choices"]) == 2  # type: ignore[index]
    assert found["r21"]["body"]["error"]["param"] == "temperature"  # type: ignore[index]
    assert found["r22"]["body"]["error"]["code"] == "model_not_found"  # type: ignore[index]
    assert found["text"]["body"]["choices"][0]["text"] == "yes"  # type: ignore[index]
    assert found["response"]["body"]["output"][-1]["content"][0]["text"] == "fine"  # type: ignore[index]
    assert all(response["request_id"] for response in found.values())


def test_what_is_answered_is_not_asked_again(client: Client, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    run(client, files)
    whole = files[1].read_bytes()
    lines = whole.split(b"\n")
    files[1].write_bytes(b"\n".join(lines[:7]) + b"\n" + lines[7][:20])
    _, told = run(client, files)
    assert len(told) == 18
    assert len(read(files[1])) == 25
    assert files[1].read_bytes().startswith(b"\n".join(lines[:7]))


def test_requests_that_find_the_queue_full_are_sent_again(open_client: Open, tmp_path: pathlib.Path) -> None:
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"SAY {number}" for number in range(40)]
    entries = [
        {"custom_id": f"p{number}", "url": "/v1/completions", "body": {"prompt": prompts, "max_tokens": 3}}
        for number in range(4)
    ]
    files[0].write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    with open_client("Yes.", max_num_queued_reqs=64) as client:
        assert run(client, files, concurrency=4) == (0, [200] * 4)
        assert client.metric("admission_rejections_total", reason="queue_full") > 0, "it was full"
    for response in read(files[1]).values():
        assert len(response["body"]["choices"]) == 40  # type: ignore[index]


def test_an_engine_that_stops_ends_the_batch_without_an_answer_for_what_is_left(
    open_client: Open, files: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, num_steps = EngineCore.step, 0

    def fail(core: EngineCore) -> object:
        nonlocal num_steps
        num_steps += 1
        assert num_steps < 12, "a bug"
        return step(core)

    monkeypatch.setattr(EngineCore, "step", fail)
    with open_client("I think.</think>Yes.") as client, pytest.raises(BatchStopped):
        run(client, files, concurrency=2)
    found = read(files[1])
    assert 0 < len(found) < 25
    assert not [response for response in found.values() if response["status_code"] == 503]
    monkeypatch.setattr(EngineCore, "step", step)
    with open_client("I think.</think>Yes.") as client:
        run(client, files)
    assert len(read(files[1])) == 25
