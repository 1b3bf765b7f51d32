"""A cluster of three hosts on one machine, each a network namespace with its own address, over real sockets."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.conftest import PROGRAMS
from tests.launched import wait_until_gone
from tests.process import ROOT

# Of commands that compile; nothing takes a third of it.
LONG_LIMIT_S = 330
_UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net"]


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"no network namespaces: {tool} is not installed")
    made = [
        *_UNSHARE,
        "sh",
        "-c",
        "ip link add name bridge0 type bridge && ip link add name one type veth peer name two",
    ]
    done = subprocess.run(made, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"the kernel refuses network namespaces: {done.stderr.strip()}")


def _run(scenario: str, environment: dict[str, str], *words: str) -> dict[str, object]:
    program = [*_UNSHARE, sys.executable, str(PROGRAMS / "cluster.py"), scenario, str(ROOT), *words]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, timeout=LONG_LIMIT_S, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_distributed_jax_runs_across_the_hosts(environment: dict[str, str]) -> None:
    done = _run("run", environment, "--module", "gather_rank", "--", "2")
    assert done["code"] == 0, done["stderr"]
    assert done["stdout"] == "gathered [10, 11, 12]\n"
    assert "coordinator 10.77.0.1:" in str(done["stderr"])


def test_a_host_that_is_cut_off_in_mid_run_ends_all_within_the_deadline(environment: dict[str, str]) -> None:
    done = _run("cut", environment, "--module", "gather_rank", "--", "loop")
    stderr = str(done["stderr"])
    assert done["code"] == 255, stderr
    assert "10.77.0.2 has been silent for " in stderr
    assert "while rank 1 ran there: the machine or the network to it is gone" in stderr
    # Deadline 5 s, grace 1 s; the rest is for a slow machine.
    assert float(str(done["seconds"])) < 30
    # Including the rank on the host that was cut off: its keeper hears nothing.
    wait_until_gone([int(pid) for pid in re.findall(r"\] pid (\d+)", stderr)])


def test_a_firewall_in_front_of_the_coordinator_is_found_before_anything_starts(environment: dict[str, str]) -> None:
    done = _run("run", environment, "--coordinator", "10.77.0.99", "--module", "gather_rank", "--", "1")
    assert done["code"] == 2
    assert "10.77.0.2 cannot reach the coordinator 10.77.0.99:" in str(done["stderr"])
    assert "gathered" not in str(done["stdout"])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["start", "prefill", "decode"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("form", ["--afd 1a1f", "--tp 2"])
def test_a_rank_that_is_cut_off_ends_all_wherever_it_is(
    environment: dict[str, str], tiny_model_path: pathlib.Path, form: str, victim: int, place: str
) -> None:
    more = ["-p", "Tell a story.", "--max-tokens", "2000", "--max-model-len", "2048", "--ignore-eos"]
    done = _run(f"cut-{victim}-{place}", environment, "--", "generate", str(tiny_model_path), *form.split(), *more)
    stderr, host = str(done["stderr"]), f"10.77.0.{victim + 1}"
    assert done["code"] == 255, stderr
    assert f"{host} has been silent for " in stderr
    role = ("attention 0", "ffn 0")[victim]
    name = f"{role} (rank {victim} on {host})" if form.startswith("--afd") else f"rank {victim} (on {host})"
    # Its last sign of life may be half a second older than the cut.
    where = "at the start" if place == "start" else r"(at the start|in [a-z ]+, call \d+|after call \d+)"
    assert re.search(rf"step3 launch:   {re.escape(name)} was {where}", stderr), stderr
    assert float(str(done["seconds"])) < 30
