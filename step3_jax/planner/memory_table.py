"""A memory plan for a reader, and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from step3_jax.layout.page import PAGE_SIZE
from step3_jax.planner.memory import MemoryPlan, RolePlan

_LABEL = 28
_COLUMN = 18


def to_lines(plan: MemoryPlan) -> Iterator[str]:
    """The plan as a table: one column per role, GiB on one device."""
    deployment = plan.deployment
    yield f"{deployment.name}: {deployment.description or 'a deployment'}"
    yield (
        f"{deployment.num_devices} devices"
        + _describe_memory(plan)
        + f"; weights {deployment.weights}, KV cache {deployment.kv_cache}, "
        + ("with vision tower" if plan.config.vision is not None else "text only")
    )
    yield ""
    yield _row("GiB on one device", [f"{one.role.name} ({one.role.num_devices})" for one in plan.roles])
    names = list(dict.fromkeys(name for one in plan.roles for name in one.parts))
    for name in names:
        yield _row(f"  {name}", [_gib(one.parts.get(name)) for one in plan.roles])
    sources = ["arithmetic" if one.compiled is None else "compiled" for one in plan.roles]
    # Of the side that has a cache.
    source = sources[0]
    if len(set(sources)) == 1:
        yield _row(f"weights ({source})", [_gib(one.weights) for one in plan.roles])
    else:
        yield _row("weights", [_gib(one.weights) for one in plan.roles])
        yield _row("  found by", sources)
    yield _row(f"KV cache ({source})", [_gib(one.kv_needed or None) for one in plan.roles])
    yield _row("workspace (estimate)", [_gib(one.workspace.total) for one in plan.roles])
    yield _row("  largest in", [one.workspace.phase for one in plan.roles])
    if any(one.workspace.history for one in plan.roles):
        yield _row(f"  token history ({source})", [_gib(one.workspace.history or None) for one in plan.roles])
    if plan.memory_bytes is not None:
        yield _row("kept free for calls", [_gib(one.kept_free) for one in plan.roles])
        yield _row("may be used", [_gib(one.budget) for one in plan.roles])
        yield _row("left over", [_gib(None if one.left is None else one.left - one.kv_needed) for one in plan.roles])
    yield ""
    yield from _describe_cache(plan)
    for problem in plan.problems:
        yield f"DOES NOT FIT: {problem}"
    for remedy in plan.remedies:
        yield f"  would fit: {remedy}"
    if not plan.problems:
        yield "fits" if plan.memory_bytes is not None else "the deployment names no memory to compare with"


def to_dict(plan: MemoryPlan) -> dict[str, object]:
    """The plan as a JSON object; all sizes in bytes, on one device."""
    workload = plan.deployment.workload
    return {
        "deployment": plan.deployment.name,
        "devices": plan.deployment.num_devices,
        "memory": plan.memory_bytes,
        "ffn_memory": plan.ffn_memory_bytes,
        "memory_share": plan.memory_share,
        "weights": plan.deployment.weights,
        "kv_cache": plan.deployment.kv_cache,
        "text_only": plan.config.vision is None,
        "max_num_batched_tokens": plan.chunk_tokens,
        "step_tokens": plan.step_tokens,
        "workload": None if workload is None else dataclasses.asdict(workload),
        "roles": {one.role.name: _role_dict(one) for one in plan.roles},
        "kv_tokens": plan.kv_tokens,
        "fits": False if plan.problems else (True if plan.memory_bytes is not None else None),
        "problems": plan.problems,
        "remedies": plan.remedies,
    }


def _describe_memory(plan: MemoryPlan) -> str:
    if not plan.memory_bytes:
        return ""
    sizes = dict.fromkeys([_gib(plan.memory_bytes), _gib(plan.ffn_memory_bytes)])
    return f" of {' and '.join(sizes)} GiB, of which {plan.memory_share:.0%} may be used"


def _role_dict(one: RolePlan) -> dict[str, object]:
    return {
        "devices": one.role.num_devices,
        "weights": one.weights,
        "weights_by_part": one.parts,
        "kv_cache": one.kv_needed,
        "kv_per_token": one.kv_per_token,
        "workspace_estimate": dataclasses.asdict(one.workspace),
        "kept_free": one.kept_free,
        "budget": one.budget,
        "left_for_kv_cache": one.left,
        "compiled": None if one.compiled is None else dataclasses.asdict(one.compiled),
    }


def _describe_cache(plan: MemoryPlan) -> Iterator[str]:
    holder = next(one for one in plan.roles if one.role.has_cache)
    workload = plan.deployment.workload
    if workload is not None:
        wanted = workload.sequences * workload.context_tokens
        yield (
            f"workload: {workload.sequences:,} sequences of {workload.context_tokens:,} tokens = {wanted:,} tokens of KV "
            f"cache, {holder.kv_per_token:,} bytes each"
        )
    tokens = plan.kv_tokens
    if tokens is not None:
        enough = ""
        if workload is not None and holder.cache is not None:
            # Each sequence has whole pages on one device.
            per_device = tokens // holder.role.num_devices // PAGE_SIZE // holder.cache.pages_per_row
            rows = per_device * holder.role.num_devices
            enough = f", or {rows:,} sequences of {workload.context_tokens:,}"
        yield f"KV tokens that fit: {tokens:,}{enough}"


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:,.2f}"
