"""Compiles the kernels' C source to a library, once for each instruction set and version of the source.

It uses the machine's compiler (`$CC`, cc, gcc, clang), or that of the package `ziglang`, which can be installed if there is
none. The library goes to the user's cache. It is not part of the wheel: it is compiled against the header of the installed
jaxlib, which a wheel would have to guess.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

# The first is AVX-512 with products of bfloat16.
InstructionSet = Literal["avx512_bf16", "avx512", "avx2", "plain"]

SOURCE = pathlib.Path(__file__).parent / "source"
INSTALL_HINT = "install a C compiler (gcc or clang), or `pip install 'step3-jax[cpu]'`, which brings one"

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
FLAGS: dict[InstructionSet, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mavx512vbmi"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "plain": (),
}
# The names in /proc/cpuinfo that each needs.
_NEEDED_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"})
NEEDED: dict[InstructionSet, frozenset[str]] = {
    "avx512_bf16": _NEEDED_AVX512 | {"avx512_bf16", "avx512vbmi"},
    "avx512": _NEEDED_AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "plain": frozenset(),
}
# No contraction: a product and a sum are rounded once only where the source says so.
_COMMON = ("-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_MAX_COMPILE_S = 300


class BuildError(Exception):
    """The library is unavailable; the message says why, and what to do."""


def find_library(instruction_set: InstructionSet, include: str, cache: pathlib.Path | None) -> pathlib.Path:
    """The compiled library: the one in the cache, or a new one.

    Args:
      instruction_set: The processor's.
      include: Folder of XLA's headers.
      cache: Where libraries are kept; with None or an unwritable folder a temporary folder is used.

    Raises:
      BuildError: If there is no compiler, or none that can compile it.
    """
    name = f"{instruction_set}-{hash_source(instruction_set, include)}.so"
    if cache is not None and (cache / name).is_file():
        return cache / name
    if cache is not None and _is_writable(cache):
        folder = cache
    else:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="step3-cpu-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compile_library(instruction_set, include, folder / name)
    return folder / name


def hash_source(instruction_set: InstructionSet, include: str) -> str:
    """A hash of what a library is made from: source, XLA's header, and flags."""
    digest = hashlib.sha256(" ".join((*_COMMON, *FLAGS[instruction_set])).encode())
    for path in (*sorted(SOURCE.iterdir()), pathlib.Path(include) / "xla" / "ffi" / "api" / "c_api.h"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(instruction_set: InstructionSet, include: str, target: pathlib.Path) -> None:
    """Compiles to `target`, which is written whole or not at all, with the first compiler that succeeds.

    Raises:
      BuildError: As `find_library`.
    """
    said = []
    for compiler in find_compilers():
        # Next to the target, so that the rename stays in one file system; other processes may compile the same.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
            new = pathlib.Path(folder) / target.name
            command = [
                *compiler,
                *_COMMON,
                *FLAGS[instruction_set],
                f"-I{include}",
                str(SOURCE / "kernels.c"),
                "-o",
                str(new),
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_MAX_COMPILE_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                said.append(f"{compiler[0]}: {error}")
                continue
            if done.returncode == 0 and new.is_file():
                new.replace(target)
                return
            said.append(f"{shlex.join(compiler)}: {_first_error(done.stderr)}")
    if not said:
        raise BuildError(f"no C compiler was found: {INSTALL_HINT}")
    raise BuildError(f"the C compiler could not compile them ({'; '.join(said)}): {INSTALL_HINT}")


def find_compilers() -> Iterator[list[str]]:
    """Commands that may compile C, the machine's own first.

    Raises:
      BuildError: If $CC is not a command line.
    """
    wanted = os.environ.get("CC")
    try:
        own = [shlex.split(wanted)] if wanted else []
    except ValueError as error:
        raise BuildError(
            f"$CC is {wanted!r}, which is not a command line ({error}): unset it, or name a compiler"
        ) from None
    names = [*own, ["cc"], ["gcc"], ["clang"]]
    for command in names:
        if command and shutil.which(command[0]):
            yield command
    if importlib.util.find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "cc"]


def choose_instruction_set(flags: frozenset[str]) -> InstructionSet:
    """The best one for a processor with these flags in /proc/cpuinfo."""
    return next(name for name, needed in NEEDED.items() if needed <= flags)


def read_cpu_flags() -> frozenset[str]:
    """This processor's features, as Linux on x86-64 lists them; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def _is_writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")[:200]
