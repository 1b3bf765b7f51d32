"""Real distributed JAX under the launcher: processes of this machine over gloo."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from step3_jax.launch.watch import LOST_PEER_CODE
from tests.launch.conftest import Start
from tests.launched import AT_PLACE, wait_until_gone


def test_processes_gather_over_gloo(start: Start) -> None:
    running = start("--local 2", ["3"], module="gather_rank")
    assert running.wait() == 0, running.stderr
    assert running.stdout == b"gathered [10, 11]\n"
    assert "[1 localhost] gathered [10, 11]\n" in running.stderr


def test_ranks_that_wait_for_a_killed_one_are_ended(start: Start) -> None:
    running = start("--local 2 --grace 1", ["loop"], module="gather_rank")
    # The keeper starts them in order, and the message names them.
    running.pids(2)
    pids = {line[1]: int(line.split()[-1]) for line in running.stderr.splitlines() if "] pid " in line}
    os.kill(pids["1"], signal.SIGKILL)
    # Rank 0 may notice by itself, but never before rank 1 has ended.
    assert running.wait() == 128 + signal.SIGKILL, running.stderr
    assert "rank 1 (on localhost) was killed (SIGKILL" in running.stderr
    wait_until_gone(list(pids.values()))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the rank in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_jax_finds_a_stopped_rank_long_before_a_long_deadline(start: Start, victim: int) -> None:
    running = start("--local 2 --grace 1 --rank-deadline 600", ["loop"], module="gather_rank")
    pids = running.pids(2)
    number = running.wait_for_rank(victim, AT_PLACE["start"])
    os.kill(number, signal.SIGSTOP)
    assert running.wait() == LOST_PEER_CODE, running.stderr
    said = rf"step3 launch: rank {victim} \(on localhost\) has made no progress for \d+ s \(stopped"
    assert re.search(said, running.stderr)
    assert "stack trace" not in running.stderr
    wait_until_gone(pids)
