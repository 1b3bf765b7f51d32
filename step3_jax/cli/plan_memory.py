"""`step3 plan memory`: whether a deployment of a large model fits, without needing its weights or its devices.

Exit code 0 if it fits, 1 if it does not, 2 for a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from step3_jax.cli.display import write_note
from step3_jax.cli.plan_model import load_config
from step3_jax.cli.plan_process import Compilation, compile_deployment
from step3_jax.cli.process import interruptible
from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import Deployment, Workload, load_deployment
from step3_jax.layout.hardware import load_hardware
from step3_jax.layout.role import check_deployment, deployed_config, is_on_cpu, roles_of
from step3_jax.layout.weight_form import CPU_FORMS
from step3_jax.planner.memory import CacheShape, MemoryPlan, plan_memory, shape_cache
from step3_jax.planner.memory_table import to_dict, to_lines
from step3_jax.sampling.speculation import Speculation

# Compiled for a deployment that names no workload: the bytes of weights do not depend on it.
_SMALL_CACHE = CacheShape(rows=4, pages_per_row=4)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    deployment = _change(load_deployment(arguments.deployment), arguments)
    config = load_config(arguments.model)
    deployed = deployed_config(config, deployment.weights, text_only=arguments.text_only)
    check_deployment(deployed, deployment)
    values = arguments.speculative_config
    speculation = None if values is None else Speculation.of(values)
    memory_gib, ffn_memory_gib = arguments.memory_gib, None
    if memory_gib is None:
        memory_gib = _find_memory(deployment, deployment.hardware)
        ffn_memory_gib = _find_memory(deployment, deployment.ffn_hardware or deployment.hardware)

    def plan(compilation: Compilation | None) -> MemoryPlan:
        return plan_memory(
            config,
            deployment,
            memory_gib=memory_gib,
            ffn_memory_gib=ffn_memory_gib,
            text_only=arguments.text_only,
            memory_share=arguments.memory_share,
            chunk_tokens=arguments.max_num_batched_tokens,
            compiled=None if compilation is None else compilation.roles,
            step_tokens=1 if speculation is None else speculation.width,
        )

    # First without compiling, so that wrong numbers are refused immediately.
    found, compilation = plan(None), None
    compiled = [role for role in roles_of(deployment) if not is_on_cpu(deployment, role.name)]
    if deployment.weights in CPU_FORMS:
        write_note(f"weights {deployment.weights} are for CPUs: only arithmetic, nothing is compiled")
    elif not compiled:
        write_note("the devices are CPUs: only arithmetic, nothing is compiled")
    elif not arguments.no_compile:
        for role in roles_of(deployment):
            if role not in compiled:
                write_note(f"the {role.name} side's devices are CPUs: its bytes are arithmetic, and it is not compiled")
        num_devices = sum(role.num_devices for role in compiled)
        write_note(f"compiling the decode step for {num_devices} devices from shapes (about a minute) ...")
        with interruptible():
            compilation = _compile(deployed, deployment, speculation)
        found = plan(compilation)
    if arguments.json:
        took = {} if compilation is None else {"seconds": compilation.seconds, "peak_bytes": compilation.peak_bytes}
        print(json.dumps(to_dict(found) | {"compilation": took or None}))
    else:
        print("\n".join(to_lines(found)))
        if compilation is not None:
            write_note(
                f"compiled in {compilation.seconds:.0f} s with {compilation.peak_bytes / 2**30:.2f} GiB of memory"
            )
    return 1 if found.problems else 0


def _compile(config: ModelConfig, deployment: Deployment, speculation: Speculation | None) -> Compilation:
    holder = next(role for role in roles_of(deployment) if role.has_cache)
    return compile_deployment(config, deployment, shape_cache(deployment, holder) or _SMALL_CACHE, speculation)


def _change(deployment: Deployment, arguments: argparse.Namespace) -> Deployment:
    """The deployment, with the command line's values in place of its own.

    Raises:
      ValueError: If only one of the two numbers of a workload is known, or one is not positive.
    """
    return dataclasses.replace(
        deployment,
        parallel=dataclasses.replace(
            deployment.parallel, vision=arguments.mm_encoder_tp_mode or deployment.parallel.vision
        ),
        weights=arguments.weights or deployment.weights,
        kv_cache=arguments.kv_cache_dtype or deployment.kv_cache,
        hardware=arguments.hardware or deployment.hardware,
        ffn_hardware=None if arguments.hardware else deployment.ffn_hardware,
        # Another device has its own memory.
        device_memory_gib=None if arguments.hardware else deployment.device_memory_gib,
        workload=_change_workload(deployment.workload, arguments.sequences, arguments.context_tokens),
    )


def _change_workload(workload: Workload | None, sequences: int | None, context_tokens: int | None) -> Workload | None:
    for name, number in (("--sequences", sequences), ("--context-tokens", context_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: at least 1 is needed")
    if sequences is None and context_tokens is None:
        return workload
    if workload is None and (sequences is None or context_tokens is None):
        raise ValueError("this deployment names no workload: give both --sequences and --context-tokens")
    base = workload or Workload(1, 1)
    return Workload(sequences or base.sequences, context_tokens or base.context_tokens)


def _find_memory(deployment: Deployment, hardware: str | None) -> float | None:
    """A device's memory: the file's number, but no more than its hardware has."""
    known = [] if deployment.device_memory_gib is None else [deployment.device_memory_gib]
    if hardware is not None:
        known.append(load_hardware(hardware).memory_gib)
    return min(known, default=None)
