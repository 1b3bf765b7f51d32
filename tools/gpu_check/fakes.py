"""Cases that go wrong in the ways kernels can, to rehearse how they are handled: --rehearse, on a CPU."""

from __future__ import annotations

import functools
import os
import signal
import time

import jax
import jax.numpy as jnp

from tools.gpu_check.case import Case, Inputs

# The slow case works for longer than it may be silent, and reports in between; the silent one does not.
ALLOWED_S, SLOW_S, SILENT_S = 20.0, 12.0, 600.0


def fake_cases() -> list[Case]:
    """One case each that is slow, hangs, is wrong, and is killed with its process; after each, one that is right."""
    makers = {"slow": _slow, "silent": _silent, "wrong": _inputs, "killed": _killed}
    fakes = [
        Case(
            name=f"fake/{name}",
            kernel=f"fake_{name}",
            make=make,
            run=functools.partial(_double, is_slow=name == "slow", is_wrong=name == "wrong"),
            tolerance=1e-3,
            allowed_s=ALLOWED_S,
        )
        for name, make in makers.items()
    ]
    after = [
        Case(name=f"fake/after-{name}", kernel=f"fake_{name}", make=_inputs, run=_double, tolerance=1e-3)
        for name in makers
    ]
    return [*fakes, *after]


def _double(x: jax.Array, *, implementation: str, is_slow: bool = False, is_wrong: bool = False) -> jax.Array:
    if implementation == "reference":
        return 2 * x
    if is_slow:
        x = jax.pure_callback(_sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return 2 * x + (1.0 if is_wrong else 0.0)


def _sleep(x: jax.Array) -> jax.Array:
    time.sleep(SLOW_S)
    return x


def _inputs(seed: int) -> Inputs:
    return (jax.random.normal(jax.random.key(seed), (4, 8), jnp.float32),)


def _slow(seed: int) -> Inputs:
    time.sleep(SLOW_S)
    return _inputs(seed)


def _silent(seed: int) -> Inputs:
    time.sleep(SILENT_S)
    return _inputs(seed)


def _killed(_: int) -> Inputs:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still there")
