"""Which tests a change requires."""

from __future__ import annotations

import pytest

from tests.process import ROOT
from tools.changed_tests import ALWAYS, choose_tests


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("step3_jax/cache/allocator.py", ["tests/unit/cache/test_allocator.py"]),
        ("step3_jax/cli/env.py", ["tests/unit/cli/test_env.py"]),
        ("step3_jax/config.py", ["tests/unit/test_config.py"]),
        ("pallas_kernels/fp8_matmul/mosaic.py", ["tests/kernels/test_fp8_matmul.py"]),
        ("tools/changed_tests.py", ["tests/unit/tools/test_changed_tests.py"]),
        ("tests/unit/cache/test_allocator.py", ["tests/unit/cache/test_allocator.py"]),
        ("README.md", ["tests/docs"]),
        ("LICENSE", []),
    ],
)
def test_a_module_is_tested_by_the_file_that_mirrors_it(changed: str, tests: list[str]) -> None:
    assert choose_tests([changed]) == sorted([ALWAYS, *tests])


def test_a_module_without_such_a_file_is_tested_by_those_that_import_it() -> None:
    found = choose_tests(["step3_jax/rank.py"])
    assert len(found) > 1
    for path in set(found) - {ALWAYS}:
        assert "step3_jax.rank" in (ROOT / path).read_text(encoding="utf-8")


def test_what_was_removed_asks_for_no_test_that_is_gone() -> None:
    assert all((ROOT / path).exists() for path in choose_tests(["tests/unit/cache/test_gone.py", "docs/gone.md"]))
