"""This process's place in a job started by Slurm, Open MPI or Kubernetes, from the variables they set.

Under these the launcher itself runs once per task; each starts only its own task's ranks.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping

from step3_jax.launch.options import LOOPBACK

# The last 4,096 ports: a job's id picks one, so that jobs that share a host rarely collide. JAX uses the same range.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
KUBERNETES_PORT = 8476
HOW = "give --local N for processes on this machine, or --hosts a,b,c for others over ssh"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a scheduler's job.

    Attributes:
      scheduler: Its name.
      index: Number of this task.
      num_tasks: All of them.
      local_index: Number of this task on its host.
      num_local: Tasks on this host.
      coordinator: Host of task 0; None if the scheduler does not say.
      port: The port that all tasks derive without communicating.
    """

    scheduler: str
    index: int
    num_tasks: int
    local_index: int
    num_local: int
    coordinator: str | None
    port: int


def detect_task(environment: Mapping[str, str], hostname: str, coordinator: str | None = None) -> Task | None:
    """Finds out which task this is.

    Args:
      environment: Variables of this process.
      hostname: This machine's name; in a pod of an indexed Job it ends with the pod's number.
      coordinator: Host of task 0, if known; otherwise it is looked up.

    Returns:
      The task; None outside the three schedulers.

    Raises:
      ValueError: If only some of the variables are set, or they are inconsistent.
    """
    # mpirun inside a Slurm job sets both; the ranks are then Open MPI's.
    if "OMPI_COMM_WORLD_RANK" in environment:
        task = _detect_open_mpi(environment)
    elif "JOB_COMPLETION_INDEX" in environment:
        task = _detect_kubernetes(environment, hostname, coordinator)
    elif "SLURM_JOB_ID" in environment:
        task = _detect_slurm(environment)
    else:
        return None
    if not (0 <= task.index < task.num_tasks and 0 <= task.local_index < task.num_local <= task.num_tasks):
        raise ValueError(
            f"{task.scheduler} calls this task {task.index} of {task.num_tasks}, {task.local_index} of "
            f"{task.num_local} on its host, which is impossible"
        )
    return task if coordinator is None else dataclasses.replace(task, coordinator=coordinator)


def first_host(node_list: str) -> str:
    """The first host of Slurm's list, such as "node001" of "node[001-004,007],login"."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, which names no host")
    return match[1] + (match[2] or "") + (match[3] or "")


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's "4(x2),3" to [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _detect_slurm(environment: Mapping[str, str]) -> Task:
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        raise ValueError(
            f"this is a Slurm job, but not a step of it: start it as `srun step3 launch -- ...` (one task per GPU), or {HOW}"
        )
    num_tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    local_index = _number(environment, "SLURM_LOCALID")
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(num_tasks)))
    node = _number(environment, "SLURM_NODEID") if len(per_node) > 1 else 0
    if node >= len(per_node):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE lists {len(per_node)} hosts")
    step = environment.get("SLURM_STEP_ID", "0")
    return Task(
        scheduler="Slurm",
        index=_number(environment, "SLURM_PROCID"),
        num_tasks=num_tasks,
        local_index=local_index,
        num_local=per_node[node],
        coordinator=first_host(environment["SLURM_STEP_NODELIST"]),
        port=_port(f"{environment['SLURM_JOB_ID']}.{step}"),
    )


def _detect_open_mpi(environment: Mapping[str, str]) -> Task:
    num_tasks = _number(environment, "OMPI_COMM_WORLD_SIZE")
    num_local = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    # Such as "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": where mpirun runs, usually rank 0's host.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    coordinator = LOOPBACK if num_local == num_tasks else match and (match[1] or match[2])
    job = environment.get("PMIX_NAMESPACE") or uri.partition(".")[0] or environment.get("OMPI_MCA_ess_base_jobid", "")
    return Task(
        scheduler="Open MPI",
        index=_number(environment, "OMPI_COMM_WORLD_RANK"),
        num_tasks=num_tasks,
        local_index=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        num_local=num_local,
        coordinator=coordinator,
        port=_port(job),
    )


def _detect_kubernetes(environment: Mapping[str, str], hostname: str, coordinator: str | None) -> Task:
    index = _number(environment, "JOB_COMPLETION_INDEX")
    if "STEP3_NUM_HOSTS" not in environment:
        raise ValueError(
            "this is a pod of an indexed Job, but nothing says how many there are: set STEP3_NUM_HOSTS to its completions "
            "(configs/launch/kubernetes.yaml does)"
        )
    num_tasks = _number(environment, "STEP3_NUM_HOSTS")
    if num_tasks == 1:
        coordinator = LOOPBACK
    elif coordinator is None:
        service, ending = environment.get("STEP3_SERVICE", ""), f"-{index}"
        if not service:
            raise ValueError(
                "the pods of a Job find each other through a headless service: create one, name it as the pods' subdomain, "
                "and set STEP3_SERVICE to its name (configs/launch/kubernetes.yaml does)"
            )
        job, dash, number = hostname.partition(".")[0].rpartition("-")
        if not dash or number != str(index):
            raise ValueError(
                f"this pod's host name is {hostname}, which does not end with {ending}: give --coordinator"
            )
        coordinator = f"{job}-0.{service}"
    return Task("Kubernetes", index, num_tasks, 0, 1, coordinator, KUBERNETES_PORT)


def _number(environment: Mapping[str, str], *names: str) -> int:
    """Value of the first of the variables that is set."""
    for name in names:
        if name in environment:
            if not environment[name].isdecimal():
                raise ValueError(f"{name} is {environment[name]!r}, which is not a number")
            return int(environment[name])
    raise ValueError(f"the scheduler has not set {names[0]}: {HOW}")


def _port(job: str) -> int:
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS
