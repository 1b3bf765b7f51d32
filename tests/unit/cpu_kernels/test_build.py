"""Compiling the CPU kernels, and what is said where that cannot be."""

from __future__ import annotations

import jax
import pytest

from step3_jax.cpu_kernels import build
from step3_jax.cpu_kernels.build import BuildError, choose_instruction_set, compile_library, find_library, hash_source


@pytest.fixture
def include():
    return jax.ffi.include_dir()


def test_without_a_compiler_the_error_says_what_to_install(include, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compilers", lambda: iter(()))
    with pytest.raises(BuildError, match=r"no C compiler was found: install .*step3-jax\[cpu\]"):
        find_library("plain", include, tmp_path)


def test_a_compiler_that_fails_is_passed_by(include, tmp_path, monkeypatch):
    good = tmp_path / "good"
    good.write_text('#!/bin/sh\nfor last; do out="$last"; done\necho compiled > "$out"\n')
    good.chmod(0o755)
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho 'x.h: fatal error: no such file' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setattr(build, "find_compilers", lambda: iter([[str(bad)], [str(good)]]))
    compile_library("plain", include, tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").read_text() == "compiled\n"
    assert not list(tmp_path.glob(".new-*"))
    monkeypatch.setattr(build, "find_compilers", lambda: iter([[str(bad)]]))
    with pytest.raises(BuildError, match="fatal error: no such file"):
        compile_library("plain", include, tmp_path / "other.so")
    assert not (tmp_path / "other.so").exists()


def test_a_library_is_found_under_the_hash_of_what_it_is_made_of(include, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compilers", lambda: iter(()))
    name = f"plain-{hash_source('plain', include)}.so"
    (tmp_path / name).touch()
    assert find_library("plain", include, tmp_path) == tmp_path / name
    assert hash_source("plain", include) != hash_source("avx2", include)


def test_the_best_instruction_set_is_chosen():
    avx2 = frozenset({"avx2", "fma", "f16c", "sse2"})
    assert choose_instruction_set(frozenset({"sse2"})) == "plain"
    assert choose_instruction_set(avx2) == "avx2"
    assert choose_instruction_set(avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}) == "avx512"
    assert choose_instruction_set(build.NEEDED["avx512"] | {"avx512_bf16"}) == "avx512"
    assert choose_instruction_set(build.NEEDED["avx512"] | {"avx512_bf16", "avx512vbmi"}) == "avx512_bf16"
