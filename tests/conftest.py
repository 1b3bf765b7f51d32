"""Set-up of all tests: CPU, exact float32 products, shapes checked at run time, and the shipped model.

`STEP3_TYPECHECK=0` leaves out the shape checks, `STEP3_TEST_PLATFORM=cuda` runs on a GPU.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

# A shell's background jobs ignore Ctrl-C, and processes that they start inherit that; tests send Ctrl-C to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before jax is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = os.environ.get("STEP3_TEST_PLATFORM", "cpu")

# Programs of tests run for milliseconds and take seconds to compile. Tests of the numbers that users get, and of compiled
# programs themselves, ask for `optimised`.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # XLA's older emitters of fusions compile in half the time. XLA reads its flags once: `optimised` keeps them. The newer
    # ones, which users get, are in `make test-thorough` and in processes that ask for them (`OPTIMISED` in process.py).
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")

# The kernels' interpreter holds one of XLA's threads for each warpgroup that waits, in all thread blocks of a cluster: with
# as many as this machine may have cores it hangs. XLA computes 32 programs at a time at most.
os.environ.setdefault("PJRT_NPROC", "32")

# One compile cache for all processes of a run, so that the same program is compiled once; the user's is not touched.
# The processes that pytest-xdist starts inherit it.
os.environ["STEP3_TEST_CACHE"] = os.environ.get("STEP3_TEST_CACHE") or tempfile.mkdtemp(prefix="step3-tests-xla-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["STEP3_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jaxtyping

# Where arrays are handled. Modules that take a user's values check those themselves; their tests pass wrong ones on purpose.
CHECKED_MODULES = [
    "pallas_kernels",
    "step3_jax.cache",
    "step3_jax.cpu_kernels.api",
    "step3_jax.engine.runner",
    "step3_jax.engine.state",
    "step3_jax.layers",
    "step3_jax.model",
    "step3_jax.quant",
    "step3_jax.sampling.penalties",
    "step3_jax.sampling.sampler",
    "step3_jax.stack",
    "step3_jax.train",
]

# Before any module of the package is imported, which is when the hook rewrites it.
if os.environ.get("STEP3_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook(CHECKED_MODULES, "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "float32")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compile cache once all processes have ended."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["STEP3_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    """Folder of arrays and texts made by independent code."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def tiny_model_path() -> pathlib.Path:
    """Folder of the shipped model, tokenizer and weights."""
    path = ROOT / "models" / "step3-tiny"
    if not (path / "model.safetensors").exists():
        pytest.skip(f"{path} has no model.safetensors: the shipped model's weights are not in this checkout")
    return path


def _compile_optimised() -> Iterator[None]:
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Programs are compiled as they are for users: those of a test, or of a file and its fixtures.
optimised = pytest.fixture(_compile_optimised, name="optimised")
optimised_file = pytest.fixture(_compile_optimised, scope="module", name="optimised_file")


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes conversion see a process as small as a command's: this one also holds the compiled programs of other tests."""
    monkeypatch.setattr("step3_jax.checkpoint.convert.anonymous_bytes", lambda: 2**28)
