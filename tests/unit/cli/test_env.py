"""`step3 env`."""

from __future__ import annotations

import json

import jax
import pytest

from step3_jax import __version__
from step3_jax.cli.main import main


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


def test_text_has_a_line_for_each_thing(capsys: pytest.CaptureFixture[str], private_compile_cache: str) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "versions"
    assert any(line.startswith("compile_cache") and private_compile_cache in line for line in lines)
    assert all("{" not in line for line in lines)
