"""Runs the tests of changed modules: `make test-changed`.

    python -m tools.changed_tests [--since REVISION] [PYTEST OPTIONS]

Changed is whatever git says differs from where the branch left `main`, including uncommitted work. A module's tests are
the file that mirrors it; failing that, the files that import it; failing those, its package's folder.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Cheap, and concerning every module.
ALWAYS = "tests/unit/test_imports.py"
_PACKAGES = ("step3_jax", "pallas_kernels", "tools")
# Tests of files that are not modules, by the start of their path.
_OTHERS = {
    "docs/": ("tests/docs", "tests/unit/tools/site"),
    "mkdocs.yml": ("tests/unit/tools/site",),
    "README.md": ("tests/docs",),
    "configs/serve/": ("tests/server/test_deployment_files.py",),
    "configs/launch/": ("tests/launch/test_files.py",),
    "containers/": ("tests/packaging",),
    "pyproject.toml": ("tests/packaging",),
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
    there = {path for path in found if (root / path).exists()}
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
    arguments, options = parser.parse_known_args()
    tests = choose_tests(find_changed(arguments.since))
    print("tests of what has changed:", *tests, sep="\n  ", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not kernels", *options, *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _of_test_file(path: str, root: pathlib.Path) -> set[str]:
    """The file itself, or the whole folder for what other tests share."""
    file = pathlib.Path(path)
    return {path} if file.name.startswith("test_") and (root / file).exists() else {str(file.parent)}


def _of_module(path: str, root: pathlib.Path) -> set[str]:
    file = pathlib.Path(path)
    package, *rooms = file.parent.parts
    name = file.stem if file.stem != "__init__" else file.parent.name
    bases = ("tests/unit", "tests") if package == "step3_jax" else ("tests/kernels", "tests/unit/tools")
    depths = ["/".join(rooms[:depth]) for depth in range(len(rooms), -1, -1)]
    mirrors = [f"{base}/{depth}/test_{name}.py".replace("//", "/") for depth in depths for base in bases]
    if package == "pallas_kernels" and rooms:
        mirrors = [f"tests/kernels/test_{name}.py" for name in (file.stem, rooms[0])]
    mirror = next((one for one in mirrors if (root / one).exists()), None)
    if mirror is not None:
        return {mirror}
    dotted = ".".join(file.with_suffix("").parts)
    importers = {
        str(test.relative_to(root))
        for test in (root / "tests").rglob("test_*.py")
        if dotted in (text := test.read_text(encoding="utf-8")) or f"{dotted.rpartition('.')[0]} import {name}" in text
    }
    return importers or {f"tests/unit/{rooms[0]}" if rooms else "tests/unit"}


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
