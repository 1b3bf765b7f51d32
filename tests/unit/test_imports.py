"""The package's order: imports flow one way, and no module grows too long. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAX_LINES = 500

# Each row may import its own part and those of the rows above; parts of one row do not import each other.
ROWS = (
    ("pallas_kernels", "rank"),
    ("resources", "stored_file", "json_schema", "gpu", "timeline", "nearest", "beacon", "channel", "cpu_count"),
    ("config_file",),
    ("config",),
    ("layout",),
    ("sharding",),
    ("quant",),
    ("stack",),
    ("cpu_kernels",),
    ("distributed",),
    ("mesh",),
    ("layers",),
    ("model",),
    ("cache", "checkpoint", "text", "sampling"),
    ("engine",),
    ("afd", "launch", "planner", "train", "server", "client"),
    ("bench",),
    ("cli",),
    ("tools",),
)
# Narrower than the rows: everything that a part may import from this project.
ONLY = {
    # They run without a device.
    "layout": {"config", "nearest", "pallas_kernels", "resources"},
    "planner": {"config", "gpu", "layout", "nearest", "resources", "timeline"},
    # Texts and images are prepared where there is no accelerator.
    "text": {"config", "json_schema", "resources", "stored_file"},
}
KERNEL_LIBRARIES = {"jax", "jaxlib", "numpy", "jaxtyping", "absl", "pallas_kernels"}


def _modules() -> list[pathlib.Path]:
    folders = [ROOT / name for name in ("step3_jax", "pallas_kernels", "tools")]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*.py"))


def _imported(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _part(name: str) -> str | None:
    """The part of the project that a module belongs to; None for other libraries."""
    first, *rest = name.split(".")
    if first in ("pallas_kernels", "tools"):
        return first
    # The package itself (its version, the names it gives to users, `python -m step3_jax`) is not a part.
    outside = ("__version__", "__init__", "__main__")
    return rest[0] if first == "step3_jax" and rest and rest[0] not in outside else None


def _dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _may_import(part: str, other: str) -> bool:
    if part == other:
        return True
    if part in ONLY:
        return other in ONLY[part]
    rows = {name: number for number, row in enumerate(ROWS) for name in row}
    # A name that is in no row is one that the package offers its users; inside, the module itself is named.
    return other in rows and rows[other] < rows[part]


def test_every_module_belongs_to_a_known_part() -> None:
    known = {name for row in ROWS for name in row}
    unknown = {_dotted(path) for path in _modules() if _part(_dotted(path)) not in known | {None}}
    assert not unknown, f"not in the table of rows: {sorted(unknown)}"


def test_the_architecture_page_has_all_rooms_in_their_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \|", page[page.index("## The rooms") :], re.MULTILINE)
    assert sorted(shown) == sorted(name for row in ROWS for name in row)
    row_of = {name: number for number, row in enumerate(ROWS) for name in row}
    assert [row_of[name] for name in shown] == sorted(row_of[name] for name in shown)


def test_imports_flow_one_way() -> None:
    wrong = []
    for path in _modules():
        part = _part(_dotted(path))
        for line, name in _imported(path):
            other = _part(name)
            if part is not None and other is not None and not _may_import(part, other):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "against the one-way order: " + "; ".join(wrong)


def test_kernels_depend_on_jax_and_numpy_alone() -> None:
    allowed = KERNEL_LIBRARIES | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _modules()
        if _part(_dotted(path)) == "pallas_kernels"
        for line, name in _imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "; ".join(wrong)


def test_text_and_planner_run_without_jax() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _modules()
        if _part(_dotted(path))
        in (
            "text",
            "planner",
            "layout",
            "config",
            "config_file",
            "gpu",
            "nearest",
            "resources",
            "stored_file",
            "json_schema",
            "launch",
            "beacon",
            "rank",
            "timeline",
        )
        for line, name in _imported(path)
        if name.split(".")[0] in ("jax", "jaxlib", "flax")
    ]
    assert not wrong, "; ".join(wrong)


def test_no_module_is_over_500_lines() -> None:
    long = {}
    for path in [*_modules(), *(ROOT / "tests").rglob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            long[str(path.relative_to(ROOT))] = lines
    assert not long, f"split these: {long}"


@pytest.mark.parametrize(
    ("part", "other", "allowed"),
    [
        ("layers", "config", True),
        ("layers", "model", False),
        ("engine", "afd", False),
        ("planner", "model", False),
        ("cli", "engine", True),
        ("cache", "text", False),
        ("engine", "LLM", False),
    ],
)
def test_the_table_means_what_the_house_says(part: str, other: str, allowed: bool) -> None:
    assert _may_import(part, other) is allowed
