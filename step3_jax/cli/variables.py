"""The environment variables that the project reads, and what each is for; `docs/environment.md` has the same table."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES = {
    "STEP3_CPU_DEVICES": "number of devices that a CPU is emulated as",
    "STEP3_KERNELS": "implementation of the kernels: auto, mosaic, interpret or reference",
    "STEP3_CPU_KERNELS": "the CPU kernels' instruction set: auto, avx512, avx2 or plain; off widens weights at load",
    "STEP3_KERNELS_TUNING": "file of block sizes that python -m tools.gpu_check wrote",
    "STEP3_COORDINATOR": "host:port of process 0 in a run of several processes",
    "STEP3_NUM_PROCESSES": "number of processes",
    "STEP3_PROCESS_ID": "number of this process, from 0",
    "STEP3_START_TIMEOUT": "seconds that the processes have to find each other (120)",
    "STEP3_ROLE": "set by step3 launch: the name of this process in messages",
    "STEP3_CHANNEL": "host:port at which process 0 listens for the other processes",
    "STEP3_SECRET": "secret of a run of several processes",
    "STEP3_BEACON": "set by step3 launch: file through which this process reports its progress",
    "STEP3_TRACE_STEPS": "1: each decode step of --afd over processes reports its progress, which costs time",
    "STEP3_NUM_HOSTS": "pods of a Kubernetes job",
    "STEP3_SERVICE": "headless service of a Kubernetes job",
    "STEP3_API_KEY": "key of a service: step3 serve requires it, commands with --url send it",
    "STEP3_LOG_LEVEL": "level of the log messages that commands show: debug, info, warning or error",
    "CUDA_VISIBLE_DEVICES": "NVIDIA's: the GPUs that JAX sees",
    "XLA_FLAGS": "XLA's: options of its compiler",
    "PJRT_NPROC": "XLA's: number of threads on a CPU, its own and those of the CPU kernels",
    "JAX_PLATFORMS": "JAX's: cpu or cuda, instead of the best that is available",
    "JAX_COMPILATION_CACHE_DIR": "JAX's: folder or address of the compile cache",
    "JAX_ENABLE_COMPILATION_CACHE": "JAX's: 0 turns the compile cache off",
}
_SECRET = ("STEP3_SECRET", "STEP3_API_KEY")


def read_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Values of `VARIABLES`, None if not set; for a secret only that it is set."""
    found: dict[str, str | None] = {name: environment.get(name) for name in VARIABLES}
    return found | {name: "(set)" for name in _SECRET if found[name] is not None}
