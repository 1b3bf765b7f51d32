"""Which CPU kernels are found, and what is said where there are none."""

from __future__ import annotations

import pytest

from step3_jax.cpu_kernels import loader
from step3_jax.cpu_kernels.build import NEEDED
from step3_jax.cpu_kernels.loader import Kernels, Unavailable, describe_kernels, find_kernels


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("STEP3_CPU_KERNELS", "off")
    assert find_kernels() == Unavailable("STEP3_CPU_KERNELS is off", is_wanted=True)
    assert describe_kernels() == "weights are widened at load; no CPU kernels: STEP3_CPU_KERNELS is off"


def test_other_machines_are_told_so(monkeypatch):
    monkeypatch.delenv("STEP3_CPU_KERNELS", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    found = find_kernels()
    assert isinstance(found, Unavailable)
    assert "Linux on x86-64" in found.reason


def test_what_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(loader, "read_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setenv("STEP3_CPU_KERNELS", "avx512")
    with pytest.raises(ValueError, match="avx512, which this processor does not have: its best is avx2"):
        find_kernels()
    monkeypatch.setenv("STEP3_CPU_KERNELS", "mmx")
    with pytest.raises(ValueError, match="allowed: auto, off, avx512_bf16, avx512, avx2, plain"):
        find_kernels()


def test_an_older_compiler_gives_the_set_without_bfloat16(monkeypatch, tmp_path):
    best, older = Unavailable("unrecognized option -mavx512bf16"), Kernels("avx512", tmp_path)
    found = {"avx512_bf16": best, "avx512": older}
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(loader, "read_cpu_flags", lambda: NEEDED["avx512_bf16"])
    monkeypatch.setattr(loader, "load_kernels", found.__getitem__)
    monkeypatch.delenv("STEP3_CPU_KERNELS", raising=False)
    assert find_kernels() == older
    assert describe_kernels() == "weights are multiplied as they are stored (avx512, in float32 alone)"
    found["avx512"] = Unavailable("no C compiler was found")
    assert find_kernels() == best


def test_products_in_bfloat16_are_for_bfloat16_activations_where_the_processor_has_them(tmp_path):
    able, other = Kernels("avx512_bf16", tmp_path), Kernels("avx512", tmp_path)
    assert able.for_activations("bfloat16").target("swiglu") == "step3_swiglu_rounded_avx512_bf16"
    assert able.for_activations("bfloat16").for_activations("float32") == able
    assert other.for_activations("bfloat16") == other
