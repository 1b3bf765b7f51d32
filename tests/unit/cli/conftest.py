"""What the commands' tests share: a small model folder with random weights, and a separate compile cache."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from step3_jax import resources
from step3_jax.checkpoint.names import expected_tensors
from step3_jax.checkpoint.safetensors_io import write_safetensors
from step3_jax.config import ModelConfig

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(scope="session")
def compile_cache_folder() -> str:
    """Shared by all tests: each command reloads the model, and would recompile it."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture
def private_compile_cache(compile_cache_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No test writes into the user's compile cache; jax's settings come back afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compile_cache_folder)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield compile_cache_folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def random_model_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The shipped model's tokenizer and template with small random weights."""
    folder = tmp_path_factory.mktemp("models") / "random"
    shipped = resources.find("models/step3-tiny")
    config = ModelConfig.preset("step3-tiny")
    small = dataclasses.replace(
        config,
        text=dataclasses.replace(
            config.text, num_hidden_layers=2, moe_layers=(1,), hidden_size=32, intermediate_size=32, share_q_dim=32
        ),
        vision=dataclasses.replace(config.vision, num_hidden_layers=1) if config.vision else None,
        dtype="float32",
    )
    # Made without jax, which would compile a program for each shape.
    random = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small.to_dict()))
    write_safetensors(
        folder / "model.safetensors",
        [
            (name, random.normal(scale=0.2, size=shape).astype(np.float32))
            for name, shape in expected_tensors(small).items()
        ],
    )
    for path in shipped.iterdir():
        if path.is_file() and not (folder / path.name).exists() and path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A picture file."""
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path
