"""Real ranks, attention in one process and FFN in another: one is killed or stopped, and the other ends and says so."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from step3_jax.afd.supervisor import LOST_PEER_CODE
from step3_jax.beacon import Reading
from tests.afd.ranks import ROLES, Rank, Start, is_decoding, is_gone, is_prefilling, is_starting, starting
from tests.process import ROOT, environment

# Compiling takes most of the time; nothing takes a third of it.
HARD_LIMIT_S = 200
DEADLINE_S = 6
# From a worker's end, or the deadline of one that is stopped, to the end of all processes.
SLACK_S = 15
# More tokens than there is time for.
LONG = ["--max-tokens", "2000", "--max-model-len", "2048", "--ignore-eos"]
PLACES = {"start": is_starting, "prefill": is_prefilling, "decode": is_decoding}
SAID = {signal.SIGKILL: "was killed (SIGKILL", signal.SIGSTOP: "has not moved for"}

slow = pytest.mark.slow


@pytest.fixture
def start(tmp_path: pathlib.Path, tiny_model_path: pathlib.Path) -> Iterator[Start]:
    words = [
        "generate",
        str(tiny_model_path),
        "--afd",
        "1a1f",
        "--afd-deadline",
        str(DEADLINE_S),
        "-p",
        "Tell a story.",
    ]
    # More tokens than there is time for.
    words += ["--max-tokens", "2000", "--max-model-len", "2048", "--ignore-eos"]
    with starting(tmp_path, [sys.executable, "-m", "step3_jax.cli.main", *words], HARD_LIMIT_S) as begin:
        yield begin


@pytest.mark.parametrize(
    ("victim", "number", "place"),
    [
        pytest.param(1, signal.SIGKILL, "decode", id="ffn-killed-in-decode"),
        pytest.param(0, signal.SIGSTOP, "prefill", id="attention-stopped-in-prefill"),
        pytest.param(0, signal.SIGKILL, "start", id="attention-killed-at-the-start", marks=slow),
        pytest.param(1, signal.SIGKILL, "start", id="ffn-killed-at-the-start", marks=slow),
        pytest.param(0, signal.SIGSTOP, "start", id="attention-stopped-at-the-start", marks=slow),
        pytest.param(1, signal.SIGSTOP, "start", id="ffn-stopped-at-the-start", marks=slow),
        pytest.param(0, signal.SIGKILL, "prefill", id="attention-killed-in-prefill", marks=slow),
        pytest.param(1, signal.SIGKILL, "prefill", id="ffn-killed-in-prefill", marks=slow),
        pytest.param(1, signal.SIGSTOP, "prefill", id="ffn-stopped-in-prefill", marks=slow),
        pytest.param(0, signal.SIGKILL, "decode", id="attention-killed-in-decode", marks=slow),
        pytest.param(0, signal.SIGSTOP, "decode", id="attention-stopped-in-decode", marks=slow),
        pytest.param(1, signal.SIGSTOP, "decode", id="ffn-stopped-in-decode", marks=slow),
    ],
)
def test_a_lost_rank_ends_the_other(start: Start, victim: int, number: signal.Signals, place: str) -> None:
    ranks = [start(0), start(1)]
    pids = [rank.wait_for(PLACES[place]) for rank in ranks]
    begin = time.monotonic()
    os.kill(pids[victim], number)
    other = ranks[1 - victim]
    codes = [rank.wait() for rank in ranks]
    took_s = time.monotonic() - begin
    assert codes[1 - victim] == LOST_PEER_CODE, other.stderr
    assert codes[victim] == (128 + signal.SIGKILL if number == signal.SIGKILL else LOST_PEER_CODE)
    assert took_s < SLACK_S + (DEADLINE_S if number == signal.SIGSTOP else 0)
    blamed = rf"{ROLES[victim]} \(rank {victim} on \S+\) {re.escape(SAID[number])}"
    for rank in ranks:
        assert re.search(blamed, rank.message()), rank.stderr
        # Not what native code says of it.
        assert "stack trace" not in rank.stderr
    here = {"start": "in the start", "prefill": "in prefill", "decode": r"in decode, step \d+, last exchange \d+"}[
        place
    ]
    assert re.search(rf"this was {ROLES[1 - victim]} \(rank {1 - victim} on \S+\), {here}", other.message())
    assert all(is_gone(pid) for pid in pids)


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker of a rank in /proc")
def test_the_launcher_ends_with_the_code_of_the_rank_that_failed(
    tmp_path: pathlib.Path, tiny_model_path: pathlib.Path
) -> None:
    words = ["generate", str(tiny_model_path), "--afd", "1a1f", "-p", "Tell a story.", *LONG]
    command = [sys.executable, "-m", "step3_jax.cli.main", "launch", "--local", "2", "--", *words]
    with (tmp_path / "err").open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.DEVNULL, stderr=stderr
        )
    launcher = Rank(process, tmp_path, HARD_LIMIT_S)
    try:
        pids = [
            launcher.wait_for(lambda found, rank=rank: is_decoding(found) and rank_of(found) == rank) for rank in (0, 1)
        ]
        os.kill(pids[1], signal.SIGKILL)
        assert launcher.wait() == 128 + signal.SIGKILL
    finally:
        # It leaves none of its processes behind.
        process.kill()
        process.wait()
    for rank in (0, 1):
        assert re.search(rf"\[{rank} localhost\] step3: error: ffn 0 \(rank 1 on \S+\) was killed", launcher.stderr)
    assert all(is_gone(pid) for pid in pids)


def rank_of(reading: Reading) -> int:
    """The rank of a worker."""
    variables = pathlib.Path(f"/proc/{reading.process_id}/environ").read_bytes().split(b"\0")
    [number] = [int(entry.partition(b"=")[2]) for entry in variables if entry.startswith(b"STEP3_PROCESS_ID=")]
    return number
