"""A process's place in a job, from the variables that the schedulers set."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import sys

import pytest

from step3_jax.launch.cluster import KUBERNETES_PORT, Task, detect_task, first_host, tasks_per_node
from step3_jax.launch.watch import LOST_PEER_CODE
from tests.launch.conftest import Start
from tests.launched import AT_PLACE

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "STEP3_NUM_HOSTS": "4", "STEP3_SERVICE": "step3"}


def test_no_scheduler() -> None:
    assert detect_task({"HOME": "/root"}, "here") is None


def test_slurm() -> None:
    task = detect_task(SLURM, "gpu008")
    assert task is not None
    assert (task.scheduler, task.index, task.num_tasks, task.local_index, task.num_local) == ("Slurm", 6, 9, 2, 4)
    assert task.coordinator == "gpu007"
    assert 61440 <= task.port <= 65535
    other_task = detect_task(SLURM | {"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}, "gpu011")
    assert other_task is not None
    assert (other_task.num_local, other_task.port) == (1, task.port)
    # Two steps of one job do not meet.
    other_step = detect_task(SLURM | {"SLURM_STEP_ID": "1"}, "gpu008")
    assert other_step is not None
    assert other_step.port != task.port


def test_a_slurm_job_outside_of_a_step_says_what_to_type() -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    with pytest.raises(ValueError, match="srun step3 launch"):
        detect_task(batch, "gpu007")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015]", "node001"),
        ("rack1-node[3-4]-ib,x", "rack1-node3-ib"),
    ],
)
def test_the_first_host_of_slurms_list(text: str, host: str) -> None:
    assert first_host(text) == host


@pytest.mark.parametrize(("text", "counts"), [("1", [1]), ("4(x2),3", [4, 4, 3]), ("2,1(x3)", [2, 1, 1, 1])])
def test_slurms_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_open_mpi() -> None:
    task = detect_task(OPEN_MPI, "b")
    assert task is not None
    assert (task.scheduler, task.index, task.num_tasks, task.local_index, task.num_local) == ("Open MPI", 5, 8, 1, 4)
    assert task.coordinator == "10.96.0.1"
    v6 = detect_task(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,2620::2]:43370"}, "b")
    assert v6 is not None
    assert v6.coordinator == "fe80::1"


def test_open_mpi_5_tells_the_job_but_not_the_host() -> None:
    environment = {name: value for name, value in OPEN_MPI.items() if "MCA" not in name}
    task = detect_task(environment | {"PMIX_NAMESPACE": "prterun-a-123@1"}, "b")
    assert task is not None
    assert task.coordinator is None
    alone = detect_task(environment | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "b")
    assert alone is not None
    assert alone.coordinator == "127.0.0.1"


def test_mpirun_in_a_slurm_job_is_open_mpi() -> None:
    task = detect_task(SLURM | OPEN_MPI, "b")
    assert task is not None
    assert task.scheduler == "Open MPI"


def test_kubernetes() -> None:
    task = detect_task(KUBERNETES, "my-job-2")
    assert task == Task("Kubernetes", 2, 4, 0, 1, "my-job-0.step3", KUBERNETES_PORT)
    alone = detect_task({"JOB_COMPLETION_INDEX": "0", "STEP3_NUM_HOSTS": "1"}, "my-job-0")
    assert alone is not None
    assert alone.coordinator == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "hostname", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, "job-0", "set STEP3_NUM_HOSTS"),
        ({"JOB_COMPLETION_INDEX": "0", "STEP3_NUM_HOSTS": "2"}, "job-0", "headless service"),
        (KUBERNETES, "node17", "does not end with -2"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "4"}, "job-4", "which is impossible"),
        (KUBERNETES | {"STEP3_NUM_HOSTS": "two"}, "job-2", "not a number"),
        (SLURM | {"SLURM_NODEID": "3"}, "x", "lists 3 hosts"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "?"}, "x", "cannot be read"),
        ({**SLURM, "SLURM_LOCALID": "4"}, "x", "which is impossible"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "x", "has not set OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_what_does_not_fit_together_is_refused(environment: dict[str, str], hostname: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_task(environment, hostname)


def _open_mpi_tasks(count: int) -> list[dict[str, str]]:
    size = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_LOCAL_SIZE": str(count), "PMIX_NAMESPACE": "job"}
    return [
        size | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)} for rank in range(count)
    ]


def test_each_task_starts_its_own_rank_and_only_task_0_writes_to_standard_output(start: Start) -> None:
    tasks = [
        start("", ["*:show=STEP3_PROCESS_ID", "*:show=STEP3_NUM_PROCESSES", "*:say=out"], **extra)
        for extra in _open_mpi_tasks(2)
    ]
    for rank, task in enumerate(tasks):
        assert task.wait() == 0, task.stderr
        assert f"Open MPI: rank {rank} of 2 on " in task.stderr
        assert f"STEP3_PROCESS_ID={rank}\n" in task.stderr
        assert "STEP3_NUM_PROCESSES=2\n" in task.stderr
        assert task.stdout == (b"out\n" if rank == 0 else b"")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the rank in /proc")
def test_each_task_watches_its_own_rank(start: Start) -> None:
    tasks = [start("--rank-deadline 2", ["*:sleep=300"], **extra) for extra in _open_mpi_tasks(2)]
    pids = [task.wait_for_rank(rank, AT_PLACE["start"]) for rank, task in enumerate(tasks)]
    os.kill(pids[1], signal.SIGSTOP)
    assert tasks[1].wait() == LOST_PEER_CODE
    assert re.search(r"step3 launch: rank 1 \(on \S+\) has made no progress for \d s", tasks[1].stderr)
    assert tasks[0].process.poll() is None


def test_distributed_jax_under_a_scheduler(start: Start) -> None:
    tasks = [start("", ["1"], module="gather_rank", **extra) for extra in _open_mpi_tasks(2)]
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].stderr + tasks[1].stderr
    assert [task.stdout for task in tasks] == [b"gathered [10, 11]\n", b""]


def test_a_pod_starts_all_ranks_of_its_host(start: Start) -> None:
    pod = {"JOB_COMPLETION_INDEX": "1", "STEP3_NUM_HOSTS": "2", "STEP3_SERVICE": "step3"}
    options = "--processes-per-host 2 --coordinator localhost"
    running = start(options, ["*:show=STEP3_PROCESS_ID", "*:show=STEP3_COORDINATOR"], **pod)
    # The test machine is not named like a pod, which --coordinator makes up for.
    assert running.wait() == 0, running.stderr
    assert "STEP3_PROCESS_ID=2\n" in running.stderr
    assert "STEP3_PROCESS_ID=3\n" in running.stderr
    assert running.stderr.count(f"STEP3_COORDINATOR=localhost:{KUBERNETES_PORT}\n") == 2


def test_a_number_of_tasks_that_does_not_fit_the_topology_is_refused(start: Start) -> None:
    running = start("", ["generate", "--afd", "2a2f"], **_open_mpi_tasks(2)[1])
    assert running.wait() == 2
    assert "--afd 2a2f needs 4 processes" in running.stderr


def test_task_0_notices_that_the_coordinator_is_another_machine(start: Start, tmp_path: pathlib.Path) -> None:
    # An address reserved for documentation, which no machine has.
    running = start("--coordinator 192.0.2.1", ["*:say=started"], **_open_mpi_tasks(2)[0])
    assert running.wait() == 2
    assert "192.0.2.1 is not an address of" in running.stderr
    assert running.stdout == b""
