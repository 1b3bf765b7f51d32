"""Where compiled programs are kept on disk."""

from __future__ import annotations

import pathlib

import jax
import pytest

from step3_jax.engine.compile_cache import enable_compile_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def restored_options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    assert enable_compile_cache() == tmp_path / "named"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_the_default_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert enable_compile_cache() == tmp_path / ".cache" / "step3-jax" / "xla"


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: pathlib.Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert enable_compile_cache(tmp_path / "file" / "folder") is None
    assert jax.config.jax_compilation_cache_dir == before
