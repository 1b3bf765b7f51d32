"""The files of a batch: what is refused before anything runs, and what is left after a kill at any byte."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import threading

import pytest

from step3_jax.server.batch_file import BatchInput, BatchOutput


def line(custom_id: object = "a", **values: object) -> dict[str, object]:
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    return entry | values


def write(path: pathlib.Path, *entries: object) -> pathlib.Path:
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)
    path.write_text(text, encoding="utf-8")
    return path


def answer(output: BatchOutput, *names: str) -> None:
    async def add() -> None:
        await asyncio.gather(*[output.add(name, 200, f"id-{name}", b'{"text": "\\u00e4\\u2028"}') for name in names])

    asyncio.run(add())


def read(path: pathlib.Path) -> list[dict[str, object]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(one) for one in data.split(b"\n")[:-1]]


def test_bodies_are_read_when_their_turn_comes(tmp_path: pathlib.Path) -> None:
    body = {"messages": [{"role": "user", "content": "ä\u2028b"}], "n": 2}
    entries = [line("a", body=body), "", line("b", url="/v1/completions", method="POST", body={"prompt": "x"})]
    given = BatchInput(write(tmp_path / "in.jsonl", *entries))
    assert [(one.custom_id, one.url) for one in given.lines] == [
        ("a", "/v1/chat/completions"),
        ("b", "/v1/completions"),
    ]
    assert [json.loads(given.read_body(one)) for one in given.lines] == [body, {"prompt": "x"}]
    given.close()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ([1], "line 2 is list"),
        (line(None), "custom_id None"),
        (line(""), "custom_id ''"),
        (line("a\nb"), "a text of one line"),
        (line("first"), "custom_id 'first' is also on line 1"),
        (line(method="GET"), "method 'GET'; POST"),
        (line(url="/v1/embeddings"), "url '/v1/embeddings'; one of /v1/chat/completions"),
        (line(body="x"), "a body that is str"),
        (line(body={"stream": True}), "leave `stream` out"),
    ],
)
def test_a_wrong_line_is_named(entry: object, said: str, tmp_path: pathlib.Path) -> None:
    file = write(tmp_path / "in.jsonl", line("first"), entry)
    with pytest.raises(ValueError, match=said):
        BatchInput(file)


def test_a_file_without_requests_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no requests"):
        BatchInput(write(tmp_path / "in.jsonl", "", ""))
    with pytest.raises(ValueError, match="No such file"):
        BatchInput(tmp_path / "none.jsonl")


def test_answers_are_lines_in_openais_form(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    output = BatchOutput(path)
    answer(output, "a", "b")
    output.close()
    first, second = read(path)
    assert first.pop("id") != second.pop("id")
    response = {"status_code": 200, "request_id": "id-a", "body": {"text": "ä\u2028"}}
    assert first == {"custom_id": "a", "response": response, "error": None}


def test_a_file_that_was_cut_at_any_byte_is_gone_on_with(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    output = BatchOutput(path)
    answer(output, "a", "b", "c")
    output.close()
    whole = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        output = BatchOutput(path)
        assert output.done == set("abc"[: sum(end <= cut for end in ends)])
        output.close()
        assert whole[: len(path.read_bytes())] == path.read_bytes()
    path.write_bytes(whole[: ends[1] - 5])
    output = BatchOutput(path)
    answer(output, "b", "c")
    output.close()
    assert [one["custom_id"] for one in read(path)] == ["a", "b", "c"]


def test_answers_that_come_while_others_are_written_go_together_and_are_on_the_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    may_go_on = threading.Event()

    def fsync(descriptor: int) -> None:
        if synced:
            may_go_on.wait(30)
        synced.append(os.fstat(descriptor).st_size)
        may_go_on.set()

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "out.jsonl"
    output = BatchOutput(path)
    answer(output, *map(str, range(50)))
    output.close()
    assert synced[-1] == path.stat().st_size
    assert len(synced) < 5
    assert len(read(path)) == 50


def test_two_processes_do_not_write_to_one_file(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no locks of this kind")
    output = BatchOutput(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="another process writes"):
        BatchOutput(tmp_path / "out.jsonl")
    output.close()
    BatchOutput(tmp_path / "out.jsonl").close()


@pytest.mark.parametrize("text", ["no JSON\n", '{"custom_id": "a"}\n', "[]\n"])
def test_other_files_are_left_alone(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not an answer of a batch"):
        BatchOutput(path)
    assert path.read_text(encoding="utf-8") == text
