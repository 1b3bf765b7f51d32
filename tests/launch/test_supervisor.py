"""Ranks that stand in for those with jax: whichever process fails, all end soon, and it is said which it was."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from step3_jax.beacon import Reading
from step3_jax.launch.watch import LOST_PEER_CODE
from tests.launch.conftest import Start
from tests.launched import Running, descendants, is_gone, wait_until_gone

NAMES = ("attention 0 (rank 0 on localhost)", "ffn 0 (rank 1 on localhost)")
OPTIONS = "--local 2 --grace 1 --rank-deadline 2"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")


def begin(start: Start, *words: str, options: str = OPTIONS, **more: str) -> Running:
    return start(options, ["--afd", "1a1f", *words], module="stand_in", **more)


def is_waiting(reading: Reading) -> bool:
    return reading.process_id > 0


def is_decoding(reading: Reading) -> bool:
    return reading.call >= 20


def blamed(running: Running) -> list[str]:
    """What the launcher said of the end, line by line."""
    return [line.removeprefix("step3 launch: ") for line in running.stderr.splitlines() if "step3 launch: " in line][4:]


def assert_nothing_is_left(running: Running, pids: list[int]) -> None:
    wait_until_gone(pids)
    assert not running.left_files()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", ["start", "decode"])
def test_a_killed_rank_ends_all(start: Start, victim: int, place: str) -> None:
    running = begin(start, *(["--wait", "0,1"] if place == "start" else []))
    is_there = is_waiting if place == "start" else is_decoding
    pids = [running.wait_for_rank(rank, is_there) for rank in (0, 1)]
    os.kill(pids[victim], signal.SIGKILL)
    assert running.wait() == 128 + signal.SIGKILL
    said = blamed(running)
    where = "at the start" if place == "start" else r"in decode, call \d+|after call \d+"
    killed = rf"{re.escape(NAMES[victim])} was killed \(SIGKILL; out of memory\?\), ({where})"
    assert re.match(killed, said[0]), said
    assert re.match(rf"  {re.escape(NAMES[1 - victim])} was ({where})", said[1]), said
    assert ("requests that had not been answered are lost" in running.stderr) == (place == "decode")
    assert_nothing_is_left(running, pids)


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (0, "start"),
        (1, "decode"),
        pytest.param(1, "start", marks=pytest.mark.slow),
        pytest.param(0, "decode", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_rank_ends_all(start: Start, victim: int, place: str) -> None:
    running = begin(start, *(["--wait", "0,1"] if place == "start" else []))
    is_there = is_waiting if place == "start" else is_decoding
    pids = [running.wait_for_rank(rank, is_there) for rank in (0, 1)]
    os.kill(pids[victim], signal.SIGSTOP)
    assert running.wait() == LOST_PEER_CODE, running.stderr
    assert re.match(rf"{re.escape(NAMES[victim])} has made no progress for \d s \(stopped", blamed(running)[0])
    assert_nothing_is_left(running, pids)


def test_ranks_without_roles_and_any_program_are_watched_too(start: Start) -> None:
    running = start(OPTIONS, ["*:sleep=300"])
    pids = [running.wait_for_rank(rank, is_waiting) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    assert running.wait() == LOST_PEER_CODE
    assert re.match(r"rank 1 \(on localhost\) has made no progress for \d s", blamed(running)[0])
    assert_nothing_is_left(running, pids)


def test_two_ranks_on_one_machine_are_four_processes(start: Start) -> None:
    running = begin(start)
    for rank in (0, 1):
        running.wait_for_rank(rank, is_decoding)
    assert len(descendants(running.process.pid)) == 3


def test_a_good_end_is_silent_and_leaves_nothing_behind(start: Start) -> None:
    running = begin(start, "--steps", "20")
    assert running.wait() == 0
    assert running.stdout == b"answer of rank 0\n"
    own = [line for line in running.stderr.splitlines() if not line.startswith("step3 launch:")]
    shown = ["[0 localhost] note of rank 0", "[1 localhost] answer of rank 1", "[1 localhost] note of rank 1"]
    assert sorted(own) == shown
    assert not running.left_files()
    assert not list((running.folder / "tmp").iterdir())


def test_who_dies_of_a_lost_peer_first_is_not_blamed_and_its_stack_is_kept(start: Start) -> None:
    running = begin(start, "--abort", "0", "--die", "1")
    assert running.wait() == 128 + signal.SIGKILL
    assert re.match(rf"{re.escape(NAMES[1])} was killed \(SIGKILL", blamed(running)[0])
    assert "stack trace" not in running.stderr
    [path] = re.findall(r"the native output of the others at that time is in (\S+)$", running.stderr, re.MULTILINE)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        kept = file.read()
    assert "[0 localhost] *** Check failure stack trace: ***\n[0 localhost]     @     0x7f210d93d7d4" in kept
    assert not running.left_files()


def test_what_native_code_of_the_failed_rank_wrote_is_shown(start: Start) -> None:
    program = "import os; os.write(2, b'F1 bad_file.cc:1] no such kernel\\n'); os.abort()"
    running = start("--local 1", [program], module="eval_rank")
    assert running.wait() == 128 + signal.SIGABRT
    assert "[0 localhost] F1 bad_file.cc:1] no such kernel\n" in running.stderr
    assert "  | F1 bad_file.cc:1] no such kernel\n" in running.stderr


def test_a_mistake_of_one_is_told_in_its_words(start: Start) -> None:
    running = begin(start, "--mistake", "1")
    assert running.wait() == 2
    assert "[1 localhost] step3: error: no such model\n" in running.stderr
    assert blamed(running)[0].startswith(f"{NAMES[1]} failed with exit code 2, at the start; ending rank 0")


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_left_while_another_waits_is_no_death(start: Start, leaver: int) -> None:
    running = begin(start, "--leave", str(leaver), "--lose-quietly", str(1 - leaver))
    assert running.wait() == LOST_PEER_CODE
    left = (
        rf"{re.escape(NAMES[leaver])} has ended normally \(exit code 0\), and for \d s {re.escape(NAMES[1 - leaver])}"
    )
    assert re.match(rf"{left} has waited for it in decode, call \d+", blamed(running)[0]), running.stderr


def test_a_service_ends_in_good_order_rank_0_first(start: Start) -> None:
    # Rank 0 needs a moment after SIGTERM, and the other ends when it is gone.
    running = start(OPTIONS, ["serve", "--drain", "0", "--end-with-peer", "1"], module="stand_in")
    pids = [running.wait_for_rank(rank, is_decoding) for rank in (0, 1)]
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0, running.stderr
    assert "SIGTERM: rank 0 has 30 s to end, then the others end" in running.stderr
    assert "[0 localhost] drained" in running.stderr
    assert all(is_gone(pid) for pid in pids)


def test_a_service_that_does_not_end_in_time_is_ended(start: Start) -> None:
    words = ["serve", "--shutdown-timeout", "0.5", "--deaf", "0,1"]
    running = start(OPTIONS, words, module="stand_in")
    pids = [running.wait_for_rank(rank, is_decoding) for rank in (0, 1)]
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    wait_until_gone(pids)
