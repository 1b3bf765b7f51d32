"""Which tests a change requires."""

from __future__ import annotations

import pytest

from tests.process import ROOT
from tools.changed_tests import ALWAYS, LONG, MARKS, choose_tests


def files_of(changed: str) -> set[str]:
    """Every file of tests that a change requires, but the one that all require."""
    chosen = [ROOT / path for path in choose_tests([changed])]
    files = [file for path in chosen for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    return {str(file.relative_to(ROOT)) for file in files} - {ALWAYS}


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("step3_jax/cache/allocator.py", ["tests/unit/cache"]),
        ("step3_jax/config.py", ["tests/unit/test_config.py"]),
        ("pallas_kernels/fp8_matmul/mosaic.py", ["tests/kernels/test_common.py", "tests/kernels/test_fp8_matmul.py"]),
        ("tools/site/repository.py", ["tests/unit/tools/site"]),
        ("tests/unit/cache/test_allocator.py", ["tests/unit/cache/test_allocator.py"]),
        ("README.md", ["tests/docs"]),
        (".gitignore", []),
    ],
)
def test_a_change_is_tested_by_its_room(changed: str, tests: list[str]) -> None:
    assert choose_tests([changed]) == sorted([ALWAYS, *tests])


@pytest.mark.parametrize(
    ("changed", "room"),
    [
        ("step3_jax/server/exchange.py", "tests/server/test_chat.py"),
        ("step3_jax/server/protocol/error.py", "tests/server/test_refusal.py"),
        ("step3_jax/server/config.py", "tests/server/test_admission.py"),
        ("step3_jax/afd/program/wire.py", "tests/afd/test_payload.py"),
        ("step3_jax/planner/attention.py", "tests/planner/test_cost.py"),
        ("step3_jax/planner/simulation/run.py", "tests/planner/simulation/test_lockstep.py"),
        ("step3_jax/launch/child.py", "tests/launch/test_plan.py"),
        ("step3_jax/cli/plan_cost.py", "tests/planner/test_plan_cost_command.py"),
        ("step3_jax/config_file.py", "tests/unit/test_config.py"),
        ("step3_jax/server/page/stream.js", "tests/server/test_chat_page.py"),
        ("step3_jax/cpu_kernels/source/matrix.h", "tests/unit/cpu_kernels/test_api.py"),
        ("configs/afd/2a2f.yaml", "tests/planner/test_memory.py"),
        ("configs/hardware/h20.yaml", "tests/unit/layout/test_hardware.py"),
        ("configs/container/cpu.Containerfile", "tests/packaging/test_container.py"),
        ("constraints.txt", "tests/packaging/test_wheel.py"),
        ("CONTRIBUTING.md", "tests/docs/test_site.py"),
    ],
)
def test_a_file_without_tests_of_its_name_is_tested_by_its_room(changed: str, room: str) -> None:
    assert room in files_of(changed)


def test_every_module_has_tests_beyond_its_imports() -> None:
    modules = [path for package in ("step3_jax", "pallas_kernels", "tools") for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 300
    assert not [path for path in modules if not files_of(str(path.relative_to(ROOT)))]


@pytest.mark.parametrize("top", ["configs", "docs", "benchmarks", "models", "step3_jax", "pyproject.toml", "Makefile"])
def test_every_other_file_that_something_depends_on_has_tests(top: str) -> None:
    path = ROOT / top
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    other = [str(file.relative_to(ROOT)) for file in files if file.suffix not in (".py", ".pyc", ".typed")]
    assert other
    assert not [name for name in other if not files_of(name)]


def test_what_takes_long_runs_for_what_it_mirrors_and_not_for_its_room() -> None:
    assert all((ROOT / path).is_file() for path in LONG)
    assert "tests/unit/engine/test_warm_up.py" in LONG
    assert "tests/unit/engine/test_warm_up.py" in files_of("step3_jax/engine/warm_up.py")
    found = files_of("step3_jax/engine/stats.py")
    assert found
    assert not found & LONG


def test_what_make_test_leaves_out_is_left_out_here_too() -> None:
    assert f'-m "{MARKS}" ' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_module_outside_rooms_is_tested_by_the_files_that_import_it() -> None:
    found = files_of("step3_jax/rank.py") - {"tests/unit/test_package.py"}
    assert len(found) > 1
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in found]
    assert all("step3_jax.rank" in text or "step3_jax import rank" in text for text in texts)


def test_what_was_removed_asks_for_no_test_that_is_gone() -> None:
    assert all((ROOT / path).exists() for path in choose_tests(["tests/unit/cache/test_gone.py", "docs/gone.md"]))
