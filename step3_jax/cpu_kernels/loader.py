"""The compiled kernels as targets of XLA's foreign function interface, and whether they are available here."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import os
import pathlib
import platform
import sys
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from step3_jax import resources
from step3_jax.cpu_kernels.build import (
    BuildError,
    InstructionSet,
    choose_instruction_set,
    find_library,
    read_cpu_flags,
)

_LOG = logging.getLogger(__name__)
VARIABLE = "STEP3_CPU_KERNELS"
OPERATIONS = ("products", "swiglu", "experts", "attend", "rows")
# The set whose kernels can multiply in bfloat16.
BF16_SET: InstructionSet = "avx512_bf16"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels that compiled programs can call.

    Attributes:
      instruction_set: The one they were compiled for.
      path: The library.
      activations: What activations are rounded to where they meet weights in bfloat16 or FP8; all else is float32.
    """

    instruction_set: InstructionSet
    path: pathlib.Path
    activations: Literal["float32", "bfloat16"] = "float32"

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies in bfloat16."""
        return self.instruction_set == BF16_SET

    def for_activations(self, dtype: jax.typing.DTypeLike) -> Kernels:
        """Those of a model with activations of `dtype`: in bfloat16 where that is asked for and can be had."""
        is_rounded = self.has_bfloat16 and jnp.dtype(dtype) == jnp.bfloat16
        return dataclasses.replace(self, activations="bfloat16" if is_rounded else "float32")

    def symbol(self, operation: str) -> str:
        """The library's function for one of `OPERATIONS`."""
        return f"step3_{operation}{'_rounded' if self.activations == 'bfloat16' else ''}"

    def target(self, operation: str) -> str:
        """The name under which programs call it."""
        return f"{self.symbol(operation)}_{self.instruction_set}"


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """No kernels.

    Attributes:
      reason: Why, and what to do, in one line.
      is_wanted: Whether they were turned off.
    """

    reason: str
    is_wanted: bool = False


def find_kernels() -> Kernels | Unavailable:
    """The kernels for this processor, compiled if necessary.

    `$STEP3_CPU_KERNELS` names another instruction set, or is "off".

    Raises:
      ValueError: If the variable names an unknown instruction set, or one that the processor lacks.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "off":
        return Unavailable(f"{VARIABLE} is off", is_wanted=True)
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return Unavailable(f"they are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    best = choose_instruction_set(read_cpu_flags())
    sets = get_args(InstructionSet)
    if wanted == "auto":
        found = load_kernels(best)
        # A compiler may be older than the instructions for bfloat16.
        if isinstance(found, Unavailable) and best == BF16_SET:
            older = load_kernels("avx512")
            return older if isinstance(older, Kernels) else found
        return found
    if wanted not in sets:
        raise ValueError(f"{VARIABLE} is {wanted!r}; allowed: auto, off, {', '.join(sets)}")
    # Most demanding first: each set includes those after it.
    if sets.index(wanted) < sets.index(best):
        raise ValueError(f"{VARIABLE} is {wanted}, which this processor does not have: its best is {best}")
    return load_kernels(next(name for name in sets if name == wanted))


@functools.cache
def load_kernels(instruction_set: InstructionSet) -> Kernels | Unavailable:
    """Loads and registers the kernels for one instruction set, which the processor must have; once per process."""
    try:
        path, library = _open_library(instruction_set)
    except (BuildError, OSError) as error:
        return Unavailable(str(error))
    kernels = Kernels(instruction_set, path)
    for variant in {kernels, kernels.for_activations(jnp.bfloat16)}:
        for operation in OPERATIONS:
            handler = jax.ffi.pycapsule(getattr(library, variant.symbol(operation)))
            jax.ffi.register_ffi_target(variant.target(operation), handler, platform="cpu", api_version=1)
    _LOG.info("CPU kernels: %s, %s", instruction_set, path)
    return kernels


def _open_library(instruction_set: InstructionSet) -> tuple[pathlib.Path, ctypes.CDLL]:
    """The library's file and the library; a damaged file in the cache is recompiled."""
    find = functools.partial(find_library, instruction_set, jax.ffi.include_dir(), resources.find_cache("cpu-kernels"))
    path = find()
    try:
        return path, ctypes.CDLL(str(path))
    except OSError as error:
        _LOG.warning("%s cannot be loaded (%s): compiling it again", path, error)
        path.unlink(missing_ok=True)
    path = find()
    return path, ctypes.CDLL(str(path))


def describe_kernels() -> str:
    """One line: how this machine's CPU multiplies, and why."""
    try:
        found = find_kernels()
    except ValueError as error:
        return str(error)
    if isinstance(found, Kernels):
        how = "also in bfloat16, with --dtype bfloat16" if found.has_bfloat16 else "in float32 alone"
        return f"weights are multiplied as they are stored ({found.instruction_set}, {how})"
    return f"weights are widened at load; no CPU kernels: {found.reason}"
