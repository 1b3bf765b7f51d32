"""The shipped files for Slurm and Kubernetes fit what the launcher looks for."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
import yaml

from step3_jax import resources
from step3_jax.channel.address import port_beside
from step3_jax.cli.main import build_parser
from step3_jax.cli.serve import read_server_config
from step3_jax.launch.cluster import KUBERNETES_PORT, detect_task
from step3_jax.launch.place import read_need


@pytest.fixture
def job() -> dict[str, dict]:
    """The documents of the Kubernetes file by kind."""
    text = resources.find("configs/launch/kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_pods_of_the_job_find_the_first_one(job: dict[str, dict]) -> None:
    spec, name = job["Job"]["spec"], job["Job"]["metadata"]["name"]
    pod = spec["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"] if "value" in entry}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["STEP3_NUM_HOSTS"])
    task = detect_task(variables | {"JOB_COMPLETION_INDEX": "1"}, f"{name}-1")
    assert task is not None
    assert task.coordinator == f"{name}-0.{pod['subdomain']}"
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert ports == {"coordinator": KUBERNETES_PORT, "channel": port_beside(KUBERNETES_PORT)}
    assert task.port == KUBERNETES_PORT
    # Over a network rank 0 asks for it.
    assert "STEP3_SECRET" in [entry["name"] for entry in pod["containers"][0]["env"]]


def leader_worker_set() -> dict[str, dict]:
    """The documents of the service over several hosts, by kind."""
    text = resources.find("configs/serve/leaderworkerset.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_pods_of_the_set_find_the_leader_and_its_command_fits() -> None:
    documents = leader_worker_set()
    group = documents["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    pods = [group[f"{name}Template"]["spec"] for name in ("leader", "worker")]
    leader, worker = (pod["containers"][0] for pod in pods)
    assert (leader["command"], leader["env"], leader["resources"]) == (
        worker["command"],
        worker["env"],
        worker["resources"],
    )
    variables = {entry["name"]: entry["value"] for entry in worker["env"] if "value" in entry}
    arguments = build_parser("launch").parse_args(worker["command"][1:])
    assert arguments.coordinator == "$(LWS_LEADER_ADDRESS)"
    task = detect_task(variables | {"JOB_COMPLETION_INDEX": "1"}, "step3-0-1", "step3-0.step3")
    assert task is not None
    assert (task.num_tasks, task.coordinator, task.port) == (group["size"], "step3-0.step3", KUBERNETES_PORT)
    need = read_need(arguments.words)
    assert need is not None
    assert need.processes() == group["size"] * arguments.processes_per_host
    serve = read_server_config(build_parser("serve").parse_args(arguments.words))
    assert all(pod["terminationGracePeriodSeconds"] > serve.shutdown_timeout + arguments.grace for pod in pods)
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert ports == {"http": serve.port, "coordinator": KUBERNETES_PORT, "channel": port_beside(KUBERNETES_PORT)}
    paths = {kind: leader[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/live"}
    assert not any(name.endswith("Probe") for name in worker), "only rank 0 answers"
    selector = documents["Service"]["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/name"] == documents["LeaderWorkerSet"]["metadata"]["name"]


def test_the_service_names_the_pods_of_the_job(job: dict[str, dict]) -> None:
    service = job["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["Job"]["metadata"]["name"]}
    assert service["metadata"]["name"] == job["Job"]["spec"]["template"]["spec"]["subdomain"]


def test_the_pods_command_is_one_that_the_command_line_takes_and_its_processes_fit(job: dict[str, dict]) -> None:
    spec = job["Job"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    program, *argv = container["command"]
    assert program == "step3"
    arguments = build_parser("launch").parse_args(argv)
    need = read_need(arguments.words)
    assert need is not None
    assert need.processes() == spec["completions"] * arguments.processes_per_host
    assert arguments.processes_per_host == container["resources"]["limits"]["nvidia.com/gpu"]
    # The pod is given time to end its ranks.
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > arguments.grace


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_batch_script_starts_the_words_it_is_given(tmp_path: pathlib.Path) -> None:
    script = resources.find("configs/launch/slurm.sbatch")
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n', encoding="utf-8")
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(script), "generate", "-p", "two words"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    words = done.stdout.splitlines()
    assert "--kill-on-bad-exit=1" in words
    assert words[words.index("step3") :] == ["step3", "launch", "--", "generate", "-p", "two words"]
    refused = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 2
    assert "usage:" in refused.stderr
