"""The wheel alone is enough: built, installed in an empty folder, used from an empty folder."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

ASK = """
import sys
sys.path.insert(0, sys.argv[1])
import step3_jax, step3_jax.resources as resources
from step3_jax.config import ModelConfig
assert step3_jax.__file__.startswith(sys.argv[1]), step3_jax.__file__
assert ModelConfig.preset("step3").text.num_hidden_layers == 61
assert str(resources.find("models/step3-tiny")).startswith(sys.argv[1])
from step3_jax.cli.main import main
assert resources.find_folder("models/step3-tiny") == resources.find("models/step3-tiny")
sys.exit(main(["generate", "models/step3-tiny", "-p", "What is the capital of France?", "--max-tokens", "8", "--json"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: make test installs it")
    folder = tmp_path_factory.mktemp("wheel")
    command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    _pip(*command)
    return next(folder.glob("step3_jax-*.whl"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_carries_the_package_and_its_files_and_nothing_else(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "step3_jax/_shipped/configs/models/step3.json" in names
    assert "step3_jax/_shipped/models/step3-tiny/tokenizer.json" in names
    assert "step3_jax/py.typed" in names
    assert "step3_jax/server/page/index.html" in names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} <= {"step3_jax", "pallas_kernels"}
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_an_installed_wheel_answers_from_anywhere(
    wheel: pathlib.Path, tiny_model_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _pip("install", "--no-deps", "--target", str(site), str(wheel))
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(site)],
        cwd=elsewhere,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["completion_tokens"] > 0
    assert answer["model"] == str(site / "step3_jax" / "_shipped" / "models" / "step3-tiny")
