"""Measured block sizes: which entry serves which shape, and that a bad file is named."""

from __future__ import annotations

import json
import pathlib

import pytest

from pallas_kernels import tuning

DEFAULTS = {"stages": 4, "splits": 1}


@pytest.fixture
def measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    path = tmp_path / "tuning.json"
    entries: list[tuning.Entry] = [
        {"op": "gemm", "shape": {"m": 64, "n": 7168}, "blocks": {"stages": 5}, "us": 40.0},
        {"op": "gemm", "shape": {"m": 128, "n": 7168}, "blocks": {"stages": 6}, "us": 45.0},
        {"op": "attention", "shape": {"batch": 8, "storage": "fp8"}, "blocks": {"splits": 16}, "us": 10.0},
    ]
    tuning.write(path, entries, device="none", jax_version="0")
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
    return path


def test_without_a_file_the_defaults_serve(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "none.json"))
    assert tuning.blocks("gemm", DEFAULTS, m=64, n=7168) == DEFAULTS


def test_a_measured_entry_overrides_only_what_it_names(measured: pathlib.Path) -> None:
    assert tuning.blocks("gemm", DEFAULTS, m=64, n=7168) == {"stages": 5, "splits": 1}


@pytest.mark.parametrize(("m", "stages"), [(70, 5), (110, 6), (256, 6), (257, 4), (32, 5), (31, 4)])
def test_the_nearest_size_within_a_factor_of_two_serves(measured: pathlib.Path, m: int, stages: int) -> None:
    assert tuning.blocks("gemm", DEFAULTS, m=m, n=7168)["stages"] == stages


def test_names_and_strings_must_be_equal(measured: pathlib.Path) -> None:
    assert tuning.blocks("attention", DEFAULTS, batch=8, storage="fp8")["splits"] == 16
    assert tuning.blocks("attention", DEFAULTS, batch=8, storage="int4") == DEFAULTS
    assert tuning.blocks("attention", DEFAULTS, batch=8) == DEFAULTS
    assert tuning.blocks("gemm", DEFAULTS, m=64, n=7168, k=64) == DEFAULTS


def test_of_two_measurements_of_one_shape_the_later_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tuning.json"
    entries: list[tuning.Entry] = [
        {"op": "gemm", "shape": {"m": 1}, "blocks": {"stages": stages}, "us": 1.0} for stages in (2, 3)
    ]
    tuning.write(path, entries, device="none", jax_version="0")
    assert [entry["blocks"] for entry in json.loads(path.read_text())["entries"]] == [{"stages": 3}]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_block_that_the_kernel_does_not_have_is_refused(measured: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="gemm has no block stages; it has rows"):
        tuning.blocks("gemm", {"rows": 64}, m=64, n=7168)


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"entries": [{"op": "gemm"}]}'])
def test_a_file_that_is_no_tuning_is_named(measured: pathlib.Path, content: str) -> None:
    measured.write_text(content)
    tuning._entries.cache_clear()
    with pytest.raises(ValueError, match=r"tuning\.json is not a list of measured block sizes"):
        tuning.blocks("gemm", DEFAULTS, m=64, n=7168)


def test_a_trial_changes_blocks_of_its_own_operation_and_lists_what_was_asked(measured: pathlib.Path) -> None:
    with tuning.trial({"gemm": {"splits": 3, "unknown": 1}}) as requests:
        assert tuning.blocks("gemm", DEFAULTS, m=64, n=7168) == {"stages": 5, "splits": 3}
        assert tuning.blocks("attention", DEFAULTS, batch=1, storage="fp8") == DEFAULTS
    assert requests == [("gemm", {"m": 64, "n": 7168}, {"stages": 5, "splits": 3})]
    assert tuning.blocks("gemm", DEFAULTS, m=64, n=7168) == {"stages": 5, "splits": 1}
