"""Several processes over gloo: the same tokens as one, each reading its own part of the weights; and their start."""

from __future__ import annotations

import json
import pathlib
import socket

import numpy as np
import pytest

from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.distributed import initialise_distributed
from tests.mesh.conftest import PROGRAMS
from tests.process import environment, free_port, run_together


def run_ranks(num_processes: int, *words: str, cpu_devices: int = 1) -> list[dict[str, object]]:
    """What each process answers."""
    own = {"STEP3_CPU_DEVICES": str(cpu_devices)}
    if num_processes > 1:
        own |= {"STEP3_COORDINATOR": f"127.0.0.1:{free_port()}", "STEP3_NUM_PROCESSES": str(num_processes)}
    ranks = [{"STEP3_PROCESS_ID": str(rank)} if num_processes > 1 else {} for rank in range(num_processes)]
    return run_together(PROGRAMS / "rank.py", words, [environment(**own, **rank) for rank in ranks])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def alone(goldens: pathlib.Path) -> dict[str, object]:
    return run_ranks(1, str(goldens / "tiny_text"), "{}")[0]


@pytest.mark.parametrize(
    ("num_processes", "cpu_devices", "setting"),
    [
        (2, 2, {"dp": 2, "tp": 2, "ep": 2}),
        # Four processes on two cores: twenty seconds, and tests/mesh/test_table.py has this exchange in one process.
        pytest.param(
            4, 1, {"dp": 2, "tp": 2, "ep": 2, "exchange": "all_to_all"}, marks=pytest.mark.slow, id="all_to_all"
        ),
    ],
)
def test_processes_give_the_tokens_of_one(
    goldens: pathlib.Path, alone: dict[str, object], num_processes: int, cpu_devices: int, setting: dict[str, int]
) -> None:
    answers = run_ranks(num_processes, str(goldens / "tiny_text"), json.dumps(setting), cpu_devices=cpu_devices)
    assert [answer["rank"] for answer in answers] == list(range(num_processes))
    for name in ("tokens", "experts"):
        assert [answer[name] for answer in answers] == [alone[name], *[None] * (num_processes - 1)]
    assert np.sum(alone["experts"]) > 0
    # Experts are divided over all devices, whatever the setting; no other process reads a process's experts.
    whole = {name: info.num_bytes for name, info in Checkpoint(goldens / "tiny_text").tensors.items()}
    experts = [name for name in whole if ".moe." in name and "moe.gate.weight" not in name]
    assert experts
    for name in experts:
        parts = [answer["read"][name] for answer in answers]
        assert parts == [whole[name] // num_processes] * num_processes, name
    output = "model.layers.0.self_attn.o_proj.weight"
    own_share = 1 if cpu_devices > 1 else 2
    assert {answer["read"][output] for answer in answers} == {whole[output] // own_share}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"STEP3_COORDINATOR": "a:1"}, "STEP3_COORDINATOR is set, but not STEP3_NUM_PROCESSES, STEP3_PROCESS_ID"),
        (
            {"STEP3_COORDINATOR": "a", "STEP3_NUM_PROCESSES": "2", "STEP3_PROCESS_ID": "0"},
            "STEP3_COORDINATOR is 'a'; host:port",
        ),
        (
            {"STEP3_COORDINATOR": "a:1", "STEP3_NUM_PROCESSES": "two", "STEP3_PROCESS_ID": "0"},
            "STEP3_NUM_PROCESSES is 'two'; a whole number",
        ),
        (
            {"STEP3_COORDINATOR": "a:1", "STEP3_NUM_PROCESSES": "2", "STEP3_PROCESS_ID": "2"},
            "STEP3_PROCESS_ID is 2; of 2 processes the numbers are 0 to 1",
        ),
        ({"STEP3_CPU_DEVICES": "0"}, "STEP3_CPU_DEVICES is '0'; a whole number of at least 1"),
    ],
)
def test_variables_that_cannot_be_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        initialise_distributed(variables)
    assert message in str(caught.value)


def test_without_variables_a_process_is_alone() -> None:
    assert initialise_distributed({}) is False


def variables(rank: int, port: int) -> dict[str, str]:
    return {
        "STEP3_COORDINATOR": f"127.0.0.1:{port}",
        "STEP3_NUM_PROCESSES": "3",
        "STEP3_PROCESS_ID": str(rank),
        "STEP3_START_TIMEOUT": "1",
    }


def test_a_process_says_that_the_coordinator_does_not_answer() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"process 1 was not called on .* at 127.0.0.1:{port} within 1 s"):
        initialise_distributed(variables(1, port))


def test_the_coordinator_names_the_processes_that_did_not_come() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=r"of 3 processes, number 1, 2 did not come to the coordinator"):
        initialise_distributed(variables(0, port))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("", 0)) as server:
        port = int(server.getsockname()[1])
        with pytest.raises(ValueError, match=rf"port {port} cannot be opened"):
            initialise_distributed(variables(0, port))
