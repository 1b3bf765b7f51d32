"""What the launcher shows of its ranks' output."""

from __future__ import annotations

import io
import pathlib

import pytest

from step3_jax.launch.log import Log


def test_after_an_interrupt_only_rank_0_is_shown_and_the_tails_are_kept() -> None:
    stdout, stderr = io.BytesIO(), io.StringIO()
    log = Log(stdout, stderr)
    for rank in range(2):
        log.push(rank, "here", "stderr", b"before\n")
    log.interrupt()
    for rank in range(2):
        log.push(rank, "here", "stderr", b"after\n")
    log.push(0, "here", "stdout", b"an answer")
    assert stderr.getvalue() == "[0 here] before\n[1 here] before\n[0 here] after\n"
    assert stdout.getvalue() == b"an answer"
    assert log.tail(1) == ["before", "after"]


def test_what_native_code_writes_is_shown_a_little_later() -> None:
    stderr = io.StringIO()
    log = Log(io.BytesIO(), stderr)
    log.push(1, "here", "native", b"[Gloo] connected\n")
    log.push(1, "here", "stderr", b"ready\n")
    log.show_native()
    assert stderr.getvalue() == "[1 here] ready\n"
    log.show_native(hold_s=0)
    assert stderr.getvalue() == "[1 here] ready\n[1 here] [Gloo] connected\n"
    assert log.keep_native() is None


def test_after_a_failure_native_code_of_the_blamed_rank_is_shown_and_of_the_others_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stderr = io.StringIO()
    log = Log(io.BytesIO(), stderr)
    for rank in range(2):
        log.push(rank, "here", "native", f"stack of {rank}\n".encode())
    log.blame(1)
    # The others are told to end, and native code says so.
    for rank in range(2):
        log.push(rank, "here", "native", f"more of {rank}\n".encode())
    log.show_native(hold_s=0)
    assert stderr.getvalue() == "[1 here] stack of 1\n[1 here] more of 1\n"
    path = log.keep_native()
    assert path is not None
    assert path.read_text(encoding="utf-8") == "[0 here] stack of 0\n"
    assert log.tail(1) == ["stack of 1", "more of 1"]
