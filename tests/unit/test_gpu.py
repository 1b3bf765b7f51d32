"""What all programs and processes on GPUs have in common, as far as a machine without one can tell."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from jaxlib import xla_client

from step3_jax import gpu
from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import parse_deployment
from step3_jax.layout.role import deployed_config
from step3_jax.planner.memory import plan_memory
from tests.process import ROOT, environment
from tests.unit.engine.fake import FakeExecutor


class Device:
    def __init__(self, stats: dict[str, int] | None) -> None:
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_weights_and_cache_leave_room_in_the_pool_which_is_a_share_already() -> None:
    devices = [Device({"bytes_limit": 1000, "bytes_in_use": used}) for used in (100, 400, 0)]
    assert gpu.memory_left(devices, 0) == gpu.memory_left(devices, 30) == 970 - 400
    assert gpu.memory_left(devices, 80) == 920 - 400
    assert gpu.memory_left([*devices, Device(None)], 0) is None
    assert gpu.memory_left([Device({"bytes_in_use": 1})], 0) is None


def test_the_plan_counts_with_the_share_that_the_pool_takes() -> None:
    assert plan_memory.__kwdefaults__["memory_share"] == gpu.MEMORY_SHARE


@pytest.mark.parametrize(("memory_gib", "chunk_tokens"), [(80, 512), (8, 65536)])
def test_the_plan_promises_the_memory_that_the_engine_gives_to_its_cache(memory_gib: int, chunk_tokens: int) -> None:
    """Where the estimate of the largest call is below the share that is always kept free, and where it is above."""
    deployment = parse_deployment("one", {"afd": "off", "workload": {"sequences": 8, "context_tokens": 256}})
    config = deployed_config(ModelConfig.preset("step3-tiny"), deployment.weights)
    (role,) = plan_memory(config, deployment, memory_gib=memory_gib, chunk_tokens=chunk_tokens).roles
    assert (role.kept_free > role.workspace.total) == (chunk_tokens == 512)
    executor = FakeExecutor()
    executor.config, executor.dtype = config, jnp.dtype(jnp.bfloat16)
    pool = int(gpu.MEMORY_SHARE * memory_gib * 2**30)
    executor.devices = (Device({"bytes_limit": pool, "bytes_in_use": role.weights}),)
    assert executor.cache_memory_bytes(8, chunk_tokens) == role.left


@pytest.mark.parametrize("name", gpu.POOL_VARIABLES)
def test_the_users_own_share_wins(name: str) -> None:
    environment = {name: "0.5"}
    gpu.claim_memory(environment)
    assert environment == {name: "0.5"}


def test_jax_reads_the_share_that_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu.POOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "memory_fraction" not in xla_client.generate_pjrt_gpu_plugin_options()
    gpu.claim_memory()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == gpu.MEMORY_SHARE
    monkeypatch.delenv(gpu.POOL_VARIABLES[0])


WATCH = """
import json, os, sys
from jax._src import xla_bridge

names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
seen, backends = [], xla_bridge.backends
def watch():
    seen.append([os.environ.get(name) for name in names])
    return backends()
xla_bridge.backends = watch
exec(sys.argv[1])
print(json.dumps([seen[0] if seen else None, [os.environ.get(name) for name in names]]))
"""
TINY = "from step3_jax.resources import find; folder = find('models/step3-tiny'); "
COMMAND = "from step3_jax.cli.main import main; main(['env', '--json'])"


@pytest.mark.parametrize(
    ("code", "own"),
    [
        (COMMAND, None),
        # That it stays is of one function, which all call.
        (COMMAND, "0.6"),
        (TINY + "from step3_jax import load_model; load_model(folder)", None),
        (TINY + "from step3_jax import LLM; LLM(folder, max_model_len=64, max_num_seqs=1)", None),
    ],
    ids=["command", "command with a share of its own", "load_model", "LLM"],
)
def test_the_share_is_set_before_the_first_device_is_used(code: str, own: str | None) -> None:
    given = {name: value for name, value in environment().items() if name not in gpu.POOL_VARIABLES}
    if own is not None:
        given[gpu.POOL_VARIABLES[1]] = own
    done = subprocess.run(
        [sys.executable, "-c", WATCH, code],
        env=given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [str(gpu.MEMORY_SHARE), None] if own is None else [None, own]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]


def test_options_are_for_gpus_alone() -> None:
    assert gpu.compiler_options("cpu") is None
    for platform in ("gpu", "cuda"):
        assert gpu.compiler_options(platform) == {"xla_disable_hlo_passes": "rematerialization"}


def test_every_program_of_an_executor_is_compiled_with_the_options() -> None:
    """Read from the source: `jax.jit` occurs only where the options are given, or where it makes an empty cache."""
    bare, given = [], 0
    for folder in ("engine", "afd"):
        for path in sorted((pathlib.Path(gpu.__file__).parent / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            with_options = {
                id(argument)
                for call in calls
                if any(keyword.arg == "compiler_options" for keyword in call.keywords)
                for argument in (call.func, *call.args)
            }
            given += len(with_options & {id(node) for node in ast.walk(tree) if _is_jit(node)})
            empty = {id(call.func) for call in calls if call.args and getattr(call.args[0], "id", None) == "make"}
            bare += [
                f"{path.name}:{node.lineno}"
                for node in ast.walk(tree)
                if _is_jit(node) and id(node) not in with_options | empty
            ]
    assert not bare
    assert given >= 2


def _is_jit(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.jit"
