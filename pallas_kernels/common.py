"""Chooses an implementation: the kernel, its interpreter, or plain JAX."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import jax

Implementation = Literal["auto", "reference", "mosaic", "interpret"]
ENVIRONMENT_VARIABLE = "STEP3_KERNELS"
# The kernels are written for Hopper.
COMPUTE_CAPABILITY = "9.0"

R = TypeVar("R")


def resolve(implementation: Implementation) -> Implementation:
    """The implementation to use: the environment variable STEP3_KERNELS, if set, replaces "auto".

    Raises:
      ValueError: If either is not an implementation.
    """
    names = get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(names)}")
    if implementation != "auto":
        return implementation
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if wanted not in names:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {wanted!r}; allowed: {', '.join(names)}")
    return wanted


def dispatch(
    implementation: Implementation,
    unsupported: str | None,
    reference: Callable[..., R],
    kernel: Callable[..., R],
    *args: object,
) -> R:
    """Runs the reference or the kernel on `args`, arrays or pytrees of them.

    "auto" uses the kernel on a Hopper GPU if it supports these arguments, and the reference elsewhere; the choice is made
    when the program is lowered, so that a program can be compiled for a GPU on a machine that has none.

    Args:
      implementation: See `Implementation`.
      unsupported: Why the kernel cannot serve these arguments; None if it can.
      reference: Plain JAX; also used for the derivative.
      kernel: Called with `args` and `interpret=`.
      *args: Arguments of both.

    Raises:
      NotImplementedError: If the kernel is requested by name and cannot serve; the message says why.
    """
    implementation = resolve(implementation)
    if implementation in ("mosaic", "interpret") and unsupported:
        raise NotImplementedError(f"{unsupported}; use implementation='auto' or 'reference'")
    if implementation == "reference" or (implementation == "auto" and (unsupported or _has_other_gpu())):
        return reference(*args)
    if implementation == "auto":

        def run(*given: object) -> R:
            cuda = functools.partial(kernel, interpret=False)
            return jax.lax.platform_dependent(*given, cuda=cuda, default=reference)

    else:
        run = functools.partial(kernel, interpret=implementation == "interpret")
    return _differentiable(run, reference)(*args)


def _differentiable(run: Callable[..., R], reference: Callable[..., R]) -> Callable[..., R]:
    """`run` with the derivative of `reference`: kernels have none, and differentiating a choice tries all of it."""
    function = jax.custom_vjp(run)

    def forward(*args: object) -> tuple[R, tuple[object, ...]]:
        return run(*args), args

    def backward(args: tuple[object, ...], cotangent: R) -> tuple[object, ...]:
        return jax.vjp(reference, *args)[1](cotangent)

    function.defvjp(forward, backward)
    return function


def _has_other_gpu() -> bool:
    """Whether this process has a GPU that the kernels do not support."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.local_devices()[0], "compute_capability", None) != COMPUTE_CAPABILITY
