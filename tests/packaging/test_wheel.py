"""The sdist and the wheel alone are enough, installed in an empty environment and used in an empty folder."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from step3_jax import __version__
from tests.process import ROOT, environment

# Building and installing take a minute or more.
pytestmark = pytest.mark.slow
ASK = ["generate", "-p", "What is the capital of France?", "--max-tokens", "8", "--json"]


def run(*command: str, cwd: pathlib.Path, **more: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the sdist, and the wheel that is built from it."""
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("build") is None:
        pytest.skip("hatchling or build is not installed: make test installs them")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


def test_the_wheel_carries_the_package_and_its_files_and_nothing_else(dist: pathlib.Path) -> None:
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    assert "step3_jax/_shipped/configs/models/step3.json" in names
    assert "step3_jax/_shipped/models/step3-tiny/tokenizer.json" in names
    assert "step3_jax/py.typed" in names
    assert "pallas_kernels/py.typed" in names
    assert "step3_jax/server/page/index.html" in names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"step3_jax", "pallas_kernels"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_version_is_that_of_the_package(dist: pathlib.Path) -> None:
    names = sorted(path.name for path in dist.iterdir())
    assert names == [f"step3_jax-{__version__}-py3-none-any.whl", f"step3_jax-{__version__}.tar.gz"]


def test_the_sdist_has_what_a_developer_needs(dist: pathlib.Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "mkdocs.yml", "docs/index.md", "tests/conftest.py", "CHANGELOG.md"} <= names


@pytest.mark.parametrize(("form", "version"), [("*.whl", "3.11"), ("*.whl", "3.12"), ("*.tar.gz", "3.12")])
def test_what_is_installed_in_an_empty_environment_answers_from_an_empty_folder(
    form: str, version: str, dist: pathlib.Path, tiny_model_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    python = shutil.which(f"python{version}")
    # A version manager has a program for every version that it could run.
    if (
        python is None
        or subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode != 0
    ):
        pytest.skip(f"python{version} is not installed")
    bin_folder, elsewhere = tmp_path / "venv" / "bin", tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache = {"PYTHONPATH": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    run(python, "-m", "venv", str(tmp_path / "venv"), cwd=elsewhere, **cache)
    constraints = str(ROOT / "constraints.txt")
    package = str(next(dist.glob(form)))
    run(str(bin_folder / "pip"), "install", "--quiet", "-c", constraints, package, cwd=elsewhere, **cache)
    answer = json.loads(run(str(bin_folder / "step3"), *ASK, cwd=elsewhere, **cache).splitlines()[-1])
    assert answer["completion_tokens"] > 0
    assert pathlib.Path(answer["model"]).is_relative_to(tmp_path / "venv")
    same = json.loads(run(str(bin_folder / "python"), "-m", "step3_jax", *ASK, cwd=elsewhere, **cache).splitlines()[-1])
    assert same["text"] == answer["text"]
