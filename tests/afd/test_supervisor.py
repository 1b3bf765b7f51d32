"""Supervisors with workers that stand in for ranks: whichever process fails, all end soon, and say which it was."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import sys
from collections.abc import Iterator

import pytest

from step3_jax.afd.supervisor import LOST_PEER_CODE
from step3_jax.beacon import Reading
from tests.afd.ranks import ROLES, Start, free_pair, is_gone, is_starting, starting

# Nothing here takes a quarter of it.
HARD_LIMIT_S = 40
DEADLINE_S = 2


def is_decoding(reading: Reading) -> bool:
    # These workers are quicker than supervisors find each other.
    return reading.step >= 100


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
    command = [sys.executable, "-m", "supervised", "--afd", "1a1f", "--afd-deadline", str(DEADLINE_S)]
    with starting(tmp_path, command, HARD_LIMIT_S) as begin:
        yield begin


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", ["start", "decode"])
def test_a_killed_worker_ends_all(start: Start, victim: int, place: str) -> None:
    words = ["--wait", "0,1"] if place == "start" else []
    ranks = [start(0, *words), start(1, *words)]
    is_there = is_starting if place == "start" else is_decoding
    pids = [rank.wait_for(is_there) for rank in ranks]
    os.kill(pids[victim], signal.SIGKILL)
    assert ranks[victim].wait() == 128 + signal.SIGKILL
    other = ranks[1 - victim]
    assert other.wait() == LOST_PEER_CODE
    for rank in ranks:
        assert re.search(rf"{ROLES[victim]} \(rank {victim} on \S+\) was killed \(SIGKILL", rank.message())
    where = "in the start" if place == "start" else r"(in decode|between two calls), step \d+, last exchange \d+0"
    assert re.search(rf"this was {ROLES[1 - victim]} \(rank {1 - victim} on \S+\), {where}\. ", other.message())
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (0, "start"),
        (1, "decode"),
        pytest.param(1, "start", marks=pytest.mark.slow),
        pytest.param(0, "decode", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_worker_ends_all(start: Start, victim: int, place: str) -> None:
    words = ["--wait", "0,1"] if place == "start" else []
    ranks = [start(0, *words), start(1, *words)]
    is_there = is_starting if place == "start" else is_decoding
    pids = [rank.wait_for(is_there) for rank in ranks]
    os.kill(pids[victim], signal.SIGSTOP)
    assert [rank.wait() for rank in ranks] == [LOST_PEER_CODE] * 2
    for rank in ranks:
        assert re.search(rf"{ROLES[victim]} \(rank {victim} on \S+\) has not moved for \d s", rank.message())
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_supervisor_ends_all_its_own_worker_included(start: Start, victim: int) -> None:
    ranks = [start(0), start(1)]
    pids = [rank.wait_for(is_decoding) for rank in ranks]
    ranks[victim].process.kill()
    assert ranks[1 - victim].wait() == LOST_PEER_CODE
    assert f"{ROLES[victim]} (rank {victim} on" in ranks[1 - victim].message()
    assert "its supervisor ended without a word" in ranks[1 - victim].message()
    ranks[victim].wait()
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_host_ends_all_and_itself_when_it_comes_back(start: Start, victim: int) -> None:
    ranks = [start(0, "--lose-quietly", "0,1"), start(1, "--lose-quietly", "0,1")]
    pids = [rank.wait_for(is_decoding) for rank in ranks]
    os.kill(ranks[victim].process.pid, signal.SIGSTOP)
    assert ranks[1 - victim].wait() == LOST_PEER_CODE
    assert f"{ROLES[victim]} (rank {victim} on" in ranks[1 - victim].message()
    assert "has not been heard for" in ranks[1 - victim].message()
    os.kill(ranks[victim].process.pid, signal.SIGCONT)
    assert ranks[victim].wait() == LOST_PEER_CODE
    assert all(is_gone(pid) for pid in pids)


def test_a_good_end_is_silent_whoever_starts_first(start: Start) -> None:
    words = ["--steps", "20"]
    ranks = {1: start(1, *words)}
    ranks[1].wait_for(is_starting)
    ranks[0] = start(0, *words)
    for number, rank in ranks.items():
        assert rank.wait() == 0
        assert rank.stderr == f"note of rank {number}\n"
        assert (rank.folder / "out").read_text(encoding="utf-8") == f"answer of rank {number}\n"
        assert {path.name for path in rank.folder.iterdir()} == {"out", "err"}


def test_who_dies_of_a_lost_peer_first_is_not_blamed_and_its_stack_is_kept(start: Start) -> None:
    ranks = [start(0, "--abort", "0"), start(1, "--die", "1")]
    assert ranks[0].wait() == LOST_PEER_CODE
    assert ranks[1].wait() == 128 + signal.SIGKILL
    assert re.search(r"ffn 0 \(rank 1 on \S+\) was killed \(SIGKILL", ranks[0].message())
    assert ranks[0].stderr.splitlines() == ["note of rank 0", ranks[0].message()]
    [path] = re.findall(r"What native code wrote here then is in (\S+)\.$", ranks[0].message())
    kept = pathlib.Path(path).read_text(encoding="utf-8")
    assert "*** Check failure stack trace: ***\n    @     0x7f210d93d7d4" in kept


def test_a_mistake_of_one_is_told_to_the_others(start: Start) -> None:
    ranks = [start(0, "--mistake", "1"), start(1, "--mistake", "1")]
    assert ranks[1].wait() == 2
    assert ranks[1].stderr == "note of rank 1\nstep3: error: no such model\n"
    assert ranks[0].wait() == LOST_PEER_CODE
    assert re.search(r"ffn 0 \(rank 1 on \S+\) failed with exit code 2: no such model; this was", ranks[0].message())


def test_a_mistake_of_all_is_told_by_each_itself(start: Start) -> None:
    ranks = [start(number, "--mistake", "0,1") for number in (0, 1)]
    for number, rank in enumerate(ranks):
        assert rank.wait() == 2
        assert rank.stderr == f"note of rank {number}\nstep3: error: no such model\n"


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_left_while_another_waits_is_no_death(start: Start, leaver: int) -> None:
    words = ["--leave", str(leaver), "--lose-quietly", str(1 - leaver)]
    ranks = [start(0, *words), start(1, *words)]
    other = ranks[1 - leaver]
    assert ranks[leaver].wait() == 0
    assert "error" not in ranks[leaver].stderr
    assert other.wait() == LOST_PEER_CODE
    left = rf"{ROLES[leaver]} \(rank {leaver} on \S+\) has ended normally \(exit code 0\), and for \d s"
    assert re.search(left, other.message())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_rank_and_the_others_say_so(start: Start, number: signal.Signals) -> None:
    ranks = [start(0), start(1)]
    pids = [rank.wait_for(is_decoding) for rank in ranks]
    os.kill(ranks[0].process.pid, number)
    assert ranks[0].wait() == 128 + number
    assert ranks[1].wait() == LOST_PEER_CODE
    assert f"was told to end ({number.name})" in ranks[1].message()
    assert all(is_gone(pid) for pid in pids)


def test_who_does_not_know_the_token_is_turned_away(start: Start) -> None:
    hub = start(0, STEP3_WATCH_TOKEN="ours")
    stranger = start(1, "--wait", "1", STEP3_WATCH_TOKEN="theirs")
    assert stranger.wait() == LOST_PEER_CODE
    assert "does not know the token of this run" in stranger.message()
    assert "turned away a connection from 127.0.0.1" in hub.stderr
    friend = start(1, "--steps", "5", STEP3_WATCH_TOKEN="ours")
    friend.wait_for(lambda reading: reading.step >= 0)
    assert hub.process.poll() is None


def test_the_port_bears_strangers(start: Start) -> None:
    port = free_pair()
    watch = {"STEP3_WATCH": f"127.0.0.1:{port}"}
    words = ["--steps", "200"]
    hub = start(0, *words, **watch)
    hub.wait_for(is_starting)
    callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    said = [b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b'{"kind": "hello", "rank": "1"}\n', b"[]\n"]
    for caller, data in zip(callers, said, strict=True):
        with contextlib.suppress(OSError):
            caller.sendall(data)
    friend = start(1, *words, **watch)
    assert (hub.wait(), friend.wait()) == (0, 0)
    for caller in callers:
        caller.close()


def test_a_port_that_is_taken_is_told_before_anything_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hub = start(0, STEP3_WATCH=f"127.0.0.1:{port}")
        assert hub.wait() != 0
    assert f"port {port}, on which the supervisors of the ranks meet, cannot be opened" in hub.stderr
    assert "note of rank 0" not in hub.stderr
