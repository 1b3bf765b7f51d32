"""Real ranks under the launcher: when one is killed or stopped, all end soon and the report says which and where."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from step3_jax.launch.watch import LOST_PEER_CODE
from tests.launched import AT_PLACE, Running, launching, wait_until_gone
from tests.process import environment

# Compiling takes most of the time; nothing takes a third of it.
HARD_LIMIT_S = 300
DEADLINE_S = 6
# From a rank's end, or the deadline of one that is stopped, to the end of all processes.
SLACK_S = 15
OPTIONS = f"--local 2 --grace 2 --rank-deadline {DEADLINE_S}"
# More tokens than there is time for.
LONG = ["--max-tokens", "2000", "--max-model-len", "2048", "--ignore-eos"]
FORMS = {"afd": (["--afd", "1a1f"], ("attention 0", "ffn 0")), "tp": (["--tp", "2"], ("rank 0", "rank 1"))}
WHERE = {"start": "at the start", "prefill": r"in prefill, call \d+", "decode": r"(in decode, call|after call) \d+"}
SAID = {signal.SIGKILL: r"was killed \(SIGKILL", signal.SIGSTOP: r"has made no progress for \d+ s"}
# The part of the matrix that runs each time, and what .ci/run adds: a rank that has compiled its programs.
QUICK = {("tp", 1, signal.SIGSTOP, "start")}
THOROUGH = {("afd", 1, signal.SIGKILL, "decode")}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
slow = pytest.mark.slow


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., Running]]:
    with launching(tmp_path, environment(), HARD_LIMIT_S) as begin:
        yield begin


def matrix() -> Iterator[object]:
    """Each form, rank, way to go and place."""
    for form in FORMS:
        for victim in (0, 1):
            for number in SAID:
                for place in AT_PLACE:
                    case = form, victim, number, place
                    marks = () if case in QUICK else pytest.mark.thorough if case in THOROUGH else slow
                    yield pytest.param(*case, id=f"{form}-{victim}-{number.name}-{place}", marks=marks)


@pytest.mark.parametrize(("form", "victim", "number", "place"), list(matrix()))
def test_a_lost_rank_ends_all(
    start: Callable[..., Running],
    tiny_model_path: pathlib.Path,
    form: str,
    victim: int,
    number: signal.Signals,
    place: str,
) -> None:
    words, roles = FORMS[form]
    running = start(OPTIONS, ["generate", str(tiny_model_path), *words, "-p", "Tell a story.", *LONG])
    pids = [running.wait_for_rank(rank, AT_PLACE["start"]) for rank in (0, 1)]
    assert running.wait_for_rank(victim, AT_PLACE[place]) == pids[victim]
    begin = time.monotonic()
    os.kill(pids[victim], number)
    code = running.wait()
    took_s = time.monotonic() - begin
    assert code == (128 + signal.SIGKILL if number == signal.SIGKILL else LOST_PEER_CODE), running.stderr
    assert took_s < SLACK_S + (DEADLINE_S if number == signal.SIGSTOP else 0)
    host = "localhost"
    names = [
        f"{role} (on {host})" if form == "tp" else f"{role} (rank {rank} on {host})" for rank, role in enumerate(roles)
    ]
    blamed = rf"^step3 launch: {re.escape(names[victim])} {SAID[number]}.*, {WHERE[place]}"
    assert re.search(blamed, running.stderr, re.MULTILINE), running.stderr
    assert re.search(rf"^step3 launch:   {re.escape(names[1 - victim])} was ", running.stderr, re.MULTILINE)
    # What native code says about it is not an explanation.
    assert "stack trace" not in running.stderr
    wait_until_gone(pids)
    assert not running.left_files()
