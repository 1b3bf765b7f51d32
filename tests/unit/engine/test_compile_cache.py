"""Where compiled programs are kept on disk."""

from __future__ import annotations

import pathlib
import warnings
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from step3_jax.engine.compile_cache import enable_compile_cache, remove_damaged

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def restored_options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    assert enable_compile_cache() == str(tmp_path / "named")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_the_default_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert enable_compile_cache() == str(tmp_path / ".cache" / "step3-jax" / "xla")


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert enable_compile_cache(tmp_path / "file" / "folder") is None
    assert jax.config.jax_compilation_cache_dir is None


def test_an_address_is_left_to_jax(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
    assert enable_compile_cache() == "gs://bucket/xla"
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/xla"
    assert not list(tmp_path.iterdir()), "no folder of that name is made"


def test_a_folder_that_the_program_has_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    assert enable_compile_cache() == str(tmp_path / "own")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_jax_turns_it_off(tmp_path: pathlib.Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_compile_cache(tmp_path / "xla") is None
    assert not (tmp_path / "xla").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" + data[1:]]
)
def test_a_damaged_entry_is_replaced_once(tmp_path: pathlib.Path, damage) -> None:
    def compile_afresh() -> list[pathlib.Path]:
        # A function of its own each time, which JAX has not compiled; what other tests have compiled stays.
        compilation_cache.reset_cache()
        enable_compile_cache(tmp_path)
        jax.jit(lambda x: jnp.sin(x) * 3.5)(2.0).block_until_ready()
        return sorted(tmp_path.glob("*-cache"))

    entries = compile_afresh()
    before = [path.read_bytes() for path in entries]
    assert entries
    assert all(zlib.decompress(data) for data in before)
    for path, data in zip(entries, before, strict=True):
        path.write_bytes(damage(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_afresh() == entries
    assert all(zlib.decompress(path.read_bytes()) for path in entries)


def test_whole_entries_stay_and_are_checked_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole-cache").write_bytes(zlib.compress(b"a program" * 1000))
    (tmp_path / "zstd-cache").write_bytes(b"\x28\xb5\x2f\xfd and more")
    (tmp_path / "cut-cache").write_bytes(zlib.compress(b"a program" * 1000)[:-5])
    (tmp_path / "other").write_bytes(b"no entry")
    assert remove_damaged(tmp_path) == ["cut-cache"]
    assert {path.name for path in tmp_path.iterdir()} >= {"whole-cache", "zstd-cache", "other"}

    def refuse(path: pathlib.Path) -> bool:
        raise AssertionError(f"{path} is unpacked again")

    monkeypatch.setattr("step3_jax.engine.compile_cache._is_whole", refuse)
    assert remove_damaged(tmp_path) == []
