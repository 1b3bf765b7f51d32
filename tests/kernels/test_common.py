"""The choice of an implementation, and that the kernels stand on their own."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common
from tests.kernels.support import lower_for_cuda

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(implementation: common.Implementation, unsupported: str | None = None) -> str:
    """Which of the two ran."""
    ran: list[str] = []

    def reference(value: jax.Array) -> jax.Array:
        ran.append("reference")
        return value

    def kernel(value: jax.Array, *, interpret: bool) -> jax.Array:
        ran.append("interpret" if interpret else "mosaic")
        return value

    common.dispatch(implementation, unsupported, reference, kernel, jnp.zeros(2))
    return ran[-1]


@pytest.mark.parametrize("implementation", ["reference", "interpret", "mosaic"])
def test_an_implementation_asked_for_by_name_runs(implementation: common.Implementation) -> None:
    assert run(implementation) == implementation


def test_auto_on_a_cpu_is_the_reference() -> None:
    assert float(jax.jit(lambda x: common.dispatch("auto", None, jnp.sin, _fails_if_run, x))(0.0)) == 0.0
    assert run("auto", "not served") == "reference"


def _fails_if_run(value: jax.Array, *, interpret: bool) -> jax.Array:
    return value + jnp.nan


def test_auto_for_cuda_is_the_kernel_alone() -> None:
    def kernel(value: jax.Array, *, interpret: bool) -> jax.Array:
        return jnp.cos(value)

    text = lower_for_cuda(lambda x: common.dispatch("auto", None, jnp.sin, kernel, x), jnp.zeros(2))
    assert "cosine" in text
    assert "sine" not in text.replace("cosine", "")


def test_auto_gives_way_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.ENVIRONMENT_VARIABLE, "interpret")
    assert run("auto") == "interpret"
    assert run("reference") == "reference"


@pytest.mark.parametrize("implementation", ["interpret", "mosaic"])
def test_a_kernel_that_cannot_serve_says_why(implementation: common.Implementation) -> None:
    with pytest.raises(NotImplementedError, match="odd heads; use implementation='auto' or 'reference'"):
        run(implementation, "odd heads")


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="STEP3_KERNELS is 'cuda'"):
        common.resolve("auto")


ALONE = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"step3_jax", "flax", "optax", "safetensors", "tokenizers", "beartype"}:
            raise ImportError(f"{name} is no dependency of pallas_kernels")

sys.meta_path.insert(0, Blocked())
import pallas_kernels
for module in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
    importlib.import_module(module.name)

import jax.numpy as jnp
from pallas_kernels.pages import empty_pages
from pallas_kernels.rope_cache_write.api import rope_cache_write
ones = jnp.ones((2, 64, 256), jnp.bfloat16)
rotated, pages = rope_cache_write(
    ones, ones[:, 0], ones[:, 0], jnp.ones((2, 128)), jnp.zeros((2, 128)), empty_pages(1, 256, "bfloat16"),
    jnp.zeros(2, jnp.int32), jnp.arange(2),
)
assert int(pages.keys.sum()) == 512
print("ALONE")
"""


def test_the_kernels_import_and_run_without_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE], check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "ALONE" in done.stdout, done.stderr


@pytest.mark.parametrize("implementation", ["auto", "interpret"])
def test_a_kernel_has_the_references_derivative(implementation: common.Implementation) -> None:
    def kernel(x: jax.Array, index: jax.Array, *, interpret: bool) -> jax.Array:
        return jax.lax.stop_gradient(x[index]) * 2.0

    def reference(x: jax.Array, index: jax.Array) -> jax.Array:
        return x[index] * 2.0

    def loss(x: jax.Array) -> jax.Array:
        return common.dispatch(implementation, None, reference, kernel, x, jnp.int32(1))

    value, slope = jax.value_and_grad(loss)(jnp.arange(3.0))
    assert float(value) == 2.0
    assert slope.tolist() == [0.0, 2.0, 0.0]
