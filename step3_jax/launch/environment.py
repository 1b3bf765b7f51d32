"""The environment of a rank: where the coordinator is, which device is its own, settings of XLA and NCCL."""

from __future__ import annotations

from collections.abc import Mapping

# Where the supervisors of the ranks meet (`step3_jax/afd/supervisor.py`), and what only this run's know.
WATCH, WATCH_TOKEN = "STEP3_WATCH", "STEP3_WATCH_TOKEN"
# Settings that a user makes here and expects there; a host's own devices and paths are not among them.
FORWARDED = ("STEP3_", "JAX_", "XLA_", "NCCL_", "HF_", "TF_CPP_")
# All of them exist in every jaxlib that this project supports: XLA ends a process that has one it does not know.
_XLA_GPU_FLAGS = {
    # The processes compile different programs (one per role), so they cannot share out the tuning of one.
    "--xla_gpu_shard_autotuning": "false",
    # Starts collectives early and waits late, so that the exchange hides behind the compute.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # A lost peer ends the process; it would wait for ever.
    "--xla_gpu_nccl_terminate_on_error": "true",
}


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that goes with a command to another host."""
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED)}


def rank_environment(
    *,
    rank: int,
    num_processes: int,
    coordinator: str,
    gpu: str | None,
    cpu_devices: int = 1,
    user: Mapping[str, str],
) -> dict[str, str]:
    """What is set for one rank.

    Args:
      rank: Its number.
      num_processes: All of them.
      coordinator: "host:port" of rank 0's coordination service.
      gpu: The one GPU of the rank, as CUDA_VISIBLE_DEVICES takes it; None for CPU.
      cpu_devices: Devices of the rank on CPU.
      user: The user's environment. Settings of XLA and NCCL made there win over ours.

    Returns:
      The variables, without those of `user` that stay as they are.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    # The coordinator is reached over gRPC, which would go through a web proxy.
    direct = [part for part in user.get("no_proxy", user.get("NO_PROXY", "")).split(",") if part]
    found = {
        "STEP3_COORDINATOR": coordinator,
        "STEP3_NUM_PROCESSES": str(num_processes),
        "STEP3_PROCESS_ID": str(rank),
        # The rank's first device is its only one. Without this, JAX under Slurm takes the one with the rank's number.
        "JAX_LOCAL_DEVICE_IDS": "0",
        "no_proxy": ",".join([*direct, *([] if host in direct else [host])]),
    }
    if gpu is None:
        return found | {"JAX_PLATFORMS": "cpu", "STEP3_CPU_DEVICES": str(cpu_devices)}
    return found | {
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": gpu,
        "XLA_FLAGS": _merge_flags(user.get("XLA_FLAGS", ""), _XLA_GPU_FLAGS),
        "NCCL_DEBUG": user.get("NCCL_DEBUG", "WARN"),
    }


def _merge_flags(given: str, ours: Mapping[str, str]) -> str:
    names = {word.partition("=")[0] for word in given.split()}
    return " ".join([*given.split(), *(f"{name}={value}" for name, value in ours.items() if name not in names)])
