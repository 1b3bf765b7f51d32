"""`step3 env`."""

from __future__ import annotations

import json
import re

import jax
import pytest

from step3_jax import __version__, resources
from step3_jax.cli import env
from step3_jax.cli.main import main
from step3_jax.cli.variables import VARIABLES
from tests.process import ROOT


def test_json_names_versions_devices_and_folders(
    capsys: pytest.CaptureFixture[str], private_compile_cache: str
) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["step3-jax"] == __version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["backend"] == "cpu"
    assert len(found["devices"]) == jax.device_count()
    assert "kernels" in found["kernels"]
    assert found["compile_cache"] == private_compile_cache
    assert found["model"] == str(resources.find("models/step3-tiny"))
    assert found["variables"]["JAX_COMPILATION_CACHE_DIR"] == private_compile_cache


def test_text_has_a_line_for_each_thing(capsys: pytest.CaptureFixture[str], private_compile_cache: str) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "versions"
    assert any(line.startswith("compile_cache") and private_compile_cache in line for line in lines)
    assert all("{" not in line for line in lines)


def test_every_variable_is_shown_and_a_secret_is_not(
    capsys: pytest.CaptureFixture[str], private_compile_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP3_KERNELS", "reference")
    monkeypatch.setenv("STEP3_SECRET", "abcdefgh")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1] for line in printed.splitlines() if len(line.split()) > 1}
    assert lines["STEP3_KERNELS"] == "reference"
    assert lines["STEP3_SECRET"] == "(set)"
    assert lines["STEP3_NUM_HOSTS"] == "-"
    assert "abcdefgh" not in printed


def test_every_variable_that_the_code_reads_is_in_the_table_of_the_docs() -> None:
    folders = (ROOT / "step3_jax", ROOT / "pallas_kernels")
    read = {
        name
        for folder in folders
        for path in folder.rglob("*.py")
        for name in re.findall(r'"(STEP3_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    }
    assert read == {name for name in VARIABLES if name.startswith("STEP3_")}
    table = re.findall(r"^\| `([A-Z0-9_]+)` \|", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), re.M)
    assert table == list(VARIABLES)


def test_devices_that_are_not_there_are_told_beside_the_rest(
    capsys: pytest.CaptureFixture[str], private_compile_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("JAX_PLATFORMS is 'cuda', and JAX has no such device here")

    monkeypatch.setattr(env, "find_devices", refuse)
    assert main(["env", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["devices"]) == (None, [])
    assert "no such device" in found["problem"]
    assert found["versions"]["step3-jax"] == __version__
