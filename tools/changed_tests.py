"""Runs the tests of changed files: `make test-changed`.

    python -m tools.changed_tests [--since REVISION] [--list] [PYTEST OPTIONS]

Changed is whatever git says differs from where the branch left `main`, including uncommitted work. A module's tests are the
file that mirrors it, or else the files that import it, and its room; what takes long only runs for what it mirrors. Files
that are no modules have theirs in a table.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Cheap, and concerning every module.
ALWAYS = "tests/unit/test_imports.py"
# So many files run in one process.
FEW = 4
# Those of `make test`.
MARKS = "not slow and not kernels and not thorough"
_PACKAGES = ("step3_jax", "pallas_kernels", "tools")
# Folders that hold the tests of a package, in folders that have its rooms' names.
_BASES = {"step3_jax": ("tests/unit", "tests"), "pallas_kernels": ("tests/kernels",), "tools": ("tests/unit/tools",)}
# Tests in other rooms than their modules', by the start of a module's path.
_ELSEWHERE = {
    "step3_jax/cli/afd": ("tests/afd",),
    "step3_jax/cli/arguments/afd": ("tests/afd",),
    "step3_jax/cli/arguments/launch": ("tests/launch",),
    "step3_jax/cli/arguments/plan": ("tests/planner",),
    "step3_jax/cli/launch": ("tests/launch",),
    "step3_jax/cli/plan": ("tests/planner",),
    "step3_jax/cli/simulate": ("tests/planner/simulation",),
    "step3_jax/config": ("tests/unit/test_config.py",),
    "step3_jax/distributed": ("tests/launch",),
    "step3_jax/timeline/": ("tests/afd/test_trace.py",),
    "tools/gpu_check/": ("tests/kernels/test_gpu_check.py", "tests/kernels/test_gpu_check_run.py"),
}
# For modules that are in no room with tests.
_OUTSIDE = {
    "step3_jax": ("tests/unit/test_package.py",),
    "pallas_kernels": ("tests/kernels/test_common.py",),
    "tools": ("tests/unit/tools",),
}
# Files that start services or processes or compile many programs, without "test_". With them their rooms take over a minute.
_LONG = {
    "tests/afd": "faults host program",
    "tests/launch": "cluster distributed local schedule supervisor",
    "tests/server": "openai process several",
    "tests/unit/checkpoint": "convert host larger_than_memory load mapped orbax_io resume stack_filler",
    "tests/unit/cli": "bench bench_engine bench_serve chat chat_remote convert generate process run_batch",
    "tests/unit/engine": "aborts decode_loop engine llm prefix runner speculation structured warm_up",
    "tests/unit/model": "cpu fuse layers",
    "tests/unit/tools": "bench_checkpoint",
    "tests/unit/train": "loop loss step",
}
LONG = frozenset(f"{folder}/test_{name}.py" for folder, names in _LONG.items() for name in names.split())
# Tests of files that are not modules, by the start of their path.
_OTHERS = {
    ".dockerignore": ("tests/packaging",),
    "CHANGELOG.md": ("tests/unit/tools/site",),
    "CODE_OF_CONDUCT.md": ("tests/unit/tools/site",),
    "CONTRIBUTING.md": ("tests/docs/test_site.py", "tests/unit/tools/site"),
    "LICENSE": ("tests/packaging",),
    "Makefile": ("tests/docs/test_message.py", "tests/packaging"),
    "README.md": ("tests/docs",),
    "SECURITY.md": ("tests/unit/tools/site",),
    "benchmarks/": ("tests/planner/simulation/test_own_ticks.py", "tests/unit/tools/site"),
    "configs/afd/": (
        "tests/docs/test_deployment.py",
        "tests/planner/test_memory.py",
        "tests/unit/layout/test_deployment.py",
        "tests/unit/layout/test_hardware.py",
    ),
    "configs/container/": ("tests/packaging",),
    "configs/gpu/": ("tests/unit/test_gpu.py",),
    "configs/hardware/": ("tests/planner", "tests/unit/layout/test_hardware.py"),
    "configs/launch/": ("tests/launch/test_files.py",),
    "configs/models/": ("tests/planner/test_shape.py", "tests/unit/test_config.py", "tests/unit/test_resources.py"),
    "configs/planner/": ("tests/planner",),
    "configs/serve/": ("tests/server/test_deployment_files.py",),
    "constraints.txt": ("tests/packaging",),
    "docs/": ("tests/docs", "tests/unit/tools/site"),
    "mkdocs.yml": ("tests/docs/test_site.py", "tests/unit/tools/site"),
    "models/step3-tiny/": ("tests/parity", "tests/test_tiny_quality.py", "tests/unit/test_resources.py"),
    "pyproject.toml": ("tests/packaging", "tests/unit/test_package.py"),
    "step3_jax/cpu_kernels/source/": ("tests/unit/cpu_kernels", "tests/unit/model/test_cpu.py"),
    "step3_jax/server/page/": (
        "tests/server/test_chat_page.py",
        "tests/server/test_chat_page_browser.py",
        "tests/server/test_chat_page_service.py",
    ),
    "tests/goldens/": ("tests/parity", "tests/unit/model/test_step3.py", "tests/unit/text/test_images.py"),
    "tests/heldout/": ("tests/test_tiny_quality.py",),
}


def choose_tests(changed: Iterable[str], root: pathlib.Path = ROOT) -> list[str]:
    """Files and folders of tests for pytest, from the root.

    Args:
      changed: Paths from the root that were changed, added or removed.
      root: The repository's root.
    """
    found = {ALWAYS}
    for path in changed:
        if path.startswith("tests/") and path.endswith(".py"):
            found |= _of_test_file(path, root)
        elif path.endswith(".py") and path.startswith(_PACKAGES):
            found |= _of_module(path, root)
        else:
            found |= {test for start, tests in _OTHERS.items() if path.startswith(start) for test in tests}
    there = set(_existing(found, root))
    # A file in a folder that is run as a whole would be collected twice.
    return sorted(path for path in there if not any(other in map(str, pathlib.Path(path).parents) for other in there))


def find_changed(since: str) -> list[str]:
    """Paths from the root that differ from where this branch left `since`, or that git does not track yet."""
    base = _git("merge-base", since, "HEAD")[0]
    return sorted({*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")})


def main() -> int:
    """Runs pytest on what was chosen."""
    parser = argparse.ArgumentParser(description="Run the tests of what has changed.")
    parser.add_argument("--since", default="main", metavar="REVISION", help="default: main")
    parser.add_argument("--list", action="store_true", help="print the tests, and run none")
    arguments, options = parser.parse_known_args()
    tests = choose_tests(find_changed(arguments.since))
    print("tests of what has changed:", *tests, sep="\n  ", flush=True)
    if arguments.list:
        return 0
    # A process takes seconds to start, most of them the import of jax.
    num_files = sum(1 if path.endswith(".py") else len([*(ROOT / path).rglob("test_*.py")]) for path in tests)
    parallel = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"] if num_files > FEW else []
    command = [sys.executable, "-m", "pytest", "-q", *parallel, "-m", MARKS, *options, *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _of_test_file(path: str, root: pathlib.Path) -> set[str]:
    """The file itself, or the whole folder for what other tests share."""
    file = pathlib.Path(path)
    return {path} if file.name.startswith("test_") and (root / file).exists() else {str(file.parent)}


def _of_module(path: str, root: pathlib.Path) -> set[str]:
    file = pathlib.Path(path)
    mirror, room = _find_mirror(file, root), _find_room(file, root)
    if mirror is not None:
        return {mirror} | room
    importers = _find_importers(file, root)
    return (importers - LONG) | room or importers


def _find_mirror(file: pathlib.Path, root: pathlib.Path) -> str | None:
    """The file of tests that has a module's name, at its depth or above it in its room."""
    package, *rooms = file.parent.parts
    name = file.stem if file.stem != "__init__" else file.parent.name
    if package == "pallas_kernels" and rooms:
        # One file for each operation.
        paths = [f"tests/kernels/test_{name}.py" for name in (file.stem, rooms[0])]
    else:
        bases = ("tests/kernels", *_BASES[package]) if package == "tools" else _BASES[package]
        # The config of one room is not the config of the package.
        lowest = 1 if package == "step3_jax" and rooms else 0
        depths = ["/".join(rooms[:depth]) for depth in range(len(rooms), lowest - 1, -1)]
        paths = [f"{base}/{depth}/test_{name}.py".replace("//", "/") for depth in depths for base in bases]
    return next((path for path in paths if (root / path).exists()), None)


def _find_importers(file: pathlib.Path, root: pathlib.Path) -> set[str]:
    """Files of tests that name a module."""
    package, _, name = ".".join(file.with_suffix("").parts).rpartition(".")
    imports = f"{package}.{name}", f"{package} import {name}"
    return {test for test, text in _read_tests(root).items() if any(words in text for words in imports)}


@functools.cache
def _read_tests(root: pathlib.Path) -> dict[str, str]:
    """The text of every file of tests."""
    return {
        str(test.relative_to(root)): test.read_text(encoding="utf-8") for test in (root / "tests").rglob("test_*.py")
    }


def _find_room(file: pathlib.Path, root: pathlib.Path) -> set[str]:
    """The tests of a module's room without the long ones; of a part of the room that has a folder, only these."""
    package, *rooms = file.parent.parts
    depths = ["/".join(rooms[:depth]) for depth in range(len(rooms), 0, -1)]
    named = [
        folders for depth in depths if (folders := _existing([f"{base}/{depth}" for base in _BASES[package]], root))
    ]
    listed = [path for start, paths in _ELSEWHERE.items() if str(file).startswith(start) for path in paths]
    folders = [*(named[0] if named else []), *_existing(listed, root)]
    return {test for path in folders or _OUTSIDE[package] for test in _without_long(path, root)}


def _existing(paths: Iterable[str], root: pathlib.Path) -> list[str]:
    return [path for path in paths if (root / path).exists()]


def _without_long(path: str, root: pathlib.Path) -> set[str]:
    """A file or folder, or the files of a folder in which some take long."""
    if not any(long.startswith(path) for long in LONG):
        return {path}
    return {str(test.relative_to(root)) for test in (root / path).rglob("test_*.py")} - LONG


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
