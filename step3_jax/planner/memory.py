"""Whether a deployment fits: weights, KV cache and workspace of each role against the memory of its devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.gpu import MEMORY_SHARE, kept_free
from step3_jax.layout.count import weight_bytes
from step3_jax.layout.deployment import Deployment, Workload
from step3_jax.layout.page import PAGE_SIZE, kv_bytes_per_token, pages_for
from step3_jax.layout.parallel import FFN, find_problems, list_parallels
from step3_jax.layout.role import Role, deployed_config, fp8_block, roles_of
from step3_jax.layout.workspace import DEFAULT_CHUNK_TOKENS, Workspace, estimate_workspace


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The KV cache of one device.

    Attributes:
      rows: Sequences at once.
      pages_per_row: Pages of each.
    """

    rows: int
    pages_per_row: int

    @property
    def num_pages(self) -> int:
        return self.rows * self.pages_per_row


@dataclasses.dataclass(frozen=True)
class CompiledBytes:
    """The bytes of one device, from a role's compiled program.

    Attributes:
      weights: Arguments, without the cache and the step's own inputs.
      kv_cache: Aliases: inputs that are returned in place.
      kv_tokens: Tokens that this cache holds.
      history: Inputs that hold the sequences' tokens, in which guesses are looked up; 0 without speculation.
    """

    weights: int
    kv_cache: int
    kv_tokens: int
    history: int = 0


@dataclasses.dataclass(frozen=True)
class RolePlan:
    """One role; all bytes are those of one device.

    Attributes:
      role: The devices.
      parts: Weights by part of the model, by arithmetic.
      weights: All weights: from the compiled program, if there is one.
      kv_per_token: Cache of one token in all layers; 0 without a cache.
      cache: The workload's cache; None without a workload or a cache.
      workspace: The estimate.
      budget: The usable memory; None for unlimited.
      compiled: The compiled program's bytes; None if nothing was compiled.
    """

    role: Role
    parts: dict[str, int]
    weights: int
    kv_per_token: int
    cache: CacheShape | None
    workspace: Workspace
    budget: int | None
    compiled: CompiledBytes | None

    @property
    def kv_needed(self) -> int:
        """Bytes of the workload's cache."""
        return 0 if self.cache is None else self.cache.num_pages * PAGE_SIZE * self.kv_per_token

    @property
    def kept_free(self) -> int:
        """Bytes for calls: the workspace, and with limited memory no less than the engine leaves."""
        return self.workspace.total if self.budget is None else kept_free(self.budget, self.workspace.total)

    @property
    def left(self) -> int | None:
        """Bytes for the cache, by the engine's own rule; negative if not even the weights fit. None for unlimited."""
        return None if self.budget is None else self.budget - self.weights - self.kept_free

    @property
    def kv_tokens(self) -> int | None:
        """Tokens, in whole pages, that fit on all devices of the role; None for unlimited, or without a cache."""
        if self.left is None or not self.kv_per_token:
            return None
        return max(self.left, 0) // (PAGE_SIZE * self.kv_per_token) * PAGE_SIZE * self.role.num_devices


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The plan of a deployment.

    Attributes:
      deployment: The deployment.
      config: The model's configuration, as deployed.
      memory_bytes: Memory of a device; None for unlimited.
      ffn_memory_bytes: Memory of a device of the FFN side, if there is one; else the same.
      memory_share: The share of it that may be used.
      chunk_tokens: Prompt tokens that each device with a cache prefills at once.
      step_tokens: T, the tokens of each sequence in a decode step.
      roles: One or two roles.
      problems: Why it does not fit; empty if it does.
      remedies: Single changes that would make it fit.
    """

    deployment: Deployment
    config: ModelConfig
    memory_bytes: int | None
    ffn_memory_bytes: int | None
    memory_share: float
    chunk_tokens: int
    step_tokens: int
    roles: list[RolePlan]
    problems: list[str]
    remedies: list[str]

    @property
    def kv_tokens(self) -> int | None:
        """Total tokens of KV cache that fit; None for unlimited."""
        return next(plan.kv_tokens for plan in self.roles if plan.role.has_cache)


def shape_cache(deployment: Deployment, role: Role) -> CacheShape | None:
    """The cache that the workload needs on each device of a role; None without a workload or a cache."""
    workload = deployment.workload
    if workload is None or not role.has_cache:
        return None
    return CacheShape(-(-workload.sequences // role.num_devices), pages_for(workload.context_tokens))


def plan_memory(
    config: ModelConfig,
    deployment: Deployment,
    *,
    memory_gib: float | None,
    ffn_memory_gib: float | None = None,
    text_only: bool = False,
    memory_share: float = MEMORY_SHARE,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    compiled: Mapping[str, CompiledBytes] | None = None,
    has_remedies: bool = True,
    step_tokens: int = 1,
) -> MemoryPlan:
    """Plans the memory of a deployment.

    Args:
      config: The model's configuration.
      deployment: What runs where. Does not check that it divides the model.
      memory_gib: Memory of a device, in GiB; None for unlimited.
      ffn_memory_gib: The same for a device of the FFN side, if it is of another kind; None for the same.
      text_only: Whether vision tower and projector are left out.
      memory_share: The share of the memory that may be used, above 0 and at most 1.
      chunk_tokens: Prompt tokens that each device with a cache prefills at once.
      compiled: Bytes of the compiled programs by the name of their role; they replace the arithmetic.
      has_remedies: Whether to look for changes that would make it fit, if it does not.
      step_tokens: T, the tokens of each sequence in a decode step: one more than are guessed at a time.

    Raises:
      ValueError: If a number is out of its range.
    """
    if not 0 < memory_share <= 1:
        raise ValueError(f"the share of the memory is {memory_share}; above 0 and at most 1 is allowed")
    for given in (memory_gib, ffn_memory_gib):
        if given is not None and not given > 0:
            raise ValueError(f"a device has {given} GiB; a number above 0 is needed")
    if chunk_tokens < 1:
        raise ValueError(f"prompts are prefilled in chunks of {chunk_tokens} tokens; at least 1 is needed")
    memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    ffn_memory_bytes = memory_bytes if ffn_memory_gib is None else int(ffn_memory_gib * 2**30)

    def plan(deployment: Deployment, text_only: bool, chunk_tokens: int, exact: bool) -> MemoryPlan:
        deployed = deployed_config(config, deployment.weights, text_only=text_only)
        roles = []
        for role in roles_of(deployment):
            size = ffn_memory_bytes if role.name == FFN else memory_bytes
            budget = None if size is None else int(size * memory_share)
            found = (compiled or {}).get(role.name) if exact else None
            roles.append(_plan_role(deployed, deployment, role, budget, chunk_tokens, step_tokens, found))
        problems = [*_find_long_context(deployed.text, deployment)]
        problems += [problem for one in roles for problem in _find_problems(one, deployment)]
        sizes = memory_bytes, ffn_memory_bytes, memory_share, chunk_tokens, step_tokens
        return MemoryPlan(deployment, deployed, *sizes, roles, problems, [])

    wanted = plan(deployment, text_only, chunk_tokens, exact=True)
    if not wanted.problems or not has_remedies:
        return wanted
    remedies = [
        name
        for name, changed, without_vision, chunk in _vary(deployment, wanted.config, text_only, chunk_tokens)
        if not plan(changed, without_vision, chunk, exact=False).problems
    ]
    return dataclasses.replace(wanted, remedies=remedies)


def _plan_role(
    config: ModelConfig,
    deployment: Deployment,
    role: Role,
    budget: int | None,
    chunk_tokens: int,
    step_tokens: int,
    compiled: CompiledBytes | None,
) -> RolePlan:
    parts, topology = weight_bytes(config, deployment.weights, role), deployment.topology
    kv_per_token = kv_bytes_per_token(config.text, deployment.kv_cache) if role.has_cache else 0
    if compiled is not None and compiled.kv_tokens:
        kv_per_token = compiled.kv_cache // compiled.kv_tokens
    cache = shape_cache(deployment, role)
    workspace = estimate_workspace(
        config,
        deployment.weights,
        role,
        rows=rows_at_once(deployment),
        chunk_tokens=chunk_tokens,
        num_sources=None if topology is None else topology.num_attention_devices,
        num_microbatches=0 if topology is None else deployment.num_microbatches,
        step_tokens=step_tokens,
        history_tokens=0 if cache is None else cache.num_pages * PAGE_SIZE,
    )
    if compiled is not None and cache is not None:
        workspace = dataclasses.replace(workspace, history=compiled.history)
    return RolePlan(
        role=role,
        parts=parts,
        weights=sum(parts.values()) if compiled is None else compiled.weights,
        kv_per_token=kv_per_token,
        cache=cache,
        workspace=workspace,
        budget=budget,
        compiled=compiled,
    )


def rows_at_once(deployment: Deployment) -> int:
    """Sequences that a device with a cache decodes at once: its part of a micro-batch, or one if not given."""
    cache = shape_cache(deployment, next(role for role in roles_of(deployment) if role.has_cache))
    if cache is None:
        return 1
    return cache.rows if deployment.topology is None else -(-cache.rows // deployment.num_microbatches)


def _find_long_context(text: TextConfig, deployment: Deployment) -> Iterator[str]:
    load, limit = deployment.workload, text.max_position_embeddings
    if load is not None and load.context_tokens > limit:
        yield f"sequences of {load.context_tokens:,} tokens are longer than the model's {limit:,} positions"


def _find_problems(plan: RolePlan, deployment: Deployment) -> Iterator[str]:
    if plan.left is None or plan.budget is None:
        return
    which = "a device" if deployment.topology is None else f"a device of the {plan.role.name} side"
    if plan.left < 0:
        yield (
            f"weights of {_gib(plan.weights)} and {_gib(plan.kept_free)} that calls need are "
            f"{_gib(-plan.left)} more than {which} may use ({_gib(plan.budget)})"
        )
    elif plan.kv_per_token and plan.left < PAGE_SIZE * plan.kv_per_token:
        yield f"no page of KV cache fits on {which}: {_gib(plan.left)} are left"
    elif plan.kv_needed > plan.left and deployment.workload is not None:
        load = deployment.workload
        yield (
            f"the KV cache of {load.sequences:,} sequences of {load.context_tokens:,} tokens takes "
            f"{_gib(plan.kv_needed)} of {which}, and {_gib(plan.left)} are left"
        )


def _vary(
    deployment: Deployment, config: ModelConfig, text_only: bool, chunk_tokens: int
) -> Iterator[tuple[str, Deployment, bool, int]]:
    """Changes that a user may make, one at a time: a description of each, and what to plan with it."""
    load, limit = deployment.workload, config.text.max_position_embeddings
    if load is not None and load.context_tokens > limit:
        shorter = dataclasses.replace(deployment, workload=Workload(load.sequences, limit))
        yield f"--context-tokens {limit}, the most that the model has", shorter, text_only, chunk_tokens
    if config.vision is not None:
        if deployment.parallel.vision == "data":
            sharded = dataclasses.replace(
                deployment, parallel=dataclasses.replace(deployment.parallel, vision="weights")
            )
            yield "mm_encoder_tp_mode weights shards the vision tower", sharded, text_only, chunk_tokens
        yield "--text-only leaves out the vision tower", deployment, True, chunk_tokens
    if chunk_tokens > 256:
        yield "--max-num-batched-tokens 256 prefills prompts in smaller chunks", deployment, text_only, 256
    if deployment.topology is None:
        for one in list_parallels(deployment.num_devices):
            is_finer = one.tp > deployment.parallel.tp and one.tp % deployment.parallel.tp == 0
            if is_finer and one.ep == deployment.parallel.ep and not find_problems(one, config.text, fp8_block(config)):
                finer = dataclasses.replace(deployment.parallel, dp=one.dp, tp=one.tp)
                changed = dataclasses.replace(deployment, parallel=finer)
                yield f"parallel.tp {one.tp}, dp {one.dp} shards more of the weights", changed, text_only, chunk_tokens
    for kv_cache in ("fp8", "int4"):
        if _row_bytes(config, kv_cache) < _row_bytes(config, deployment.kv_cache):
            changed = dataclasses.replace(deployment, kv_cache=kv_cache)
            yield f"kv_cache {kv_cache} makes the cache smaller", changed, text_only, chunk_tokens
    if deployment.weights != "fp8":
        yield "weights fp8", dataclasses.replace(deployment, weights="fp8"), text_only, chunk_tokens


def _row_bytes(config: ModelConfig, kv_cache: str) -> float:
    try:
        return kv_bytes_per_token(config.text, kv_cache)
    except ValueError:
        return math.inf


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
