"""Verification finds every changed byte, and measures the error of what is stored."""

from __future__ import annotations

import pytest

from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.source import open_source
from step3_jax.checkpoint.verify import verify


@pytest.fixture
def make(tmp_path):
    """Converts, and opens source and result."""

    def convert_to(source, **options):
        source = open_source(source)
        report = convert(plan_conversion(source, **options), tmp_path / "out")
        return source, open_source(tmp_path / "out"), report

    return convert_to


@pytest.mark.parametrize(
    ("name", "options", "actions"),
    [
        ("tiny_vl", {}, {"copy"}),
        ("tiny_vl", {"dtype": "bf16"}, {"cast"}),
        ("tiny_text", {"dtype": "fp8", "form": "hf"}, {"quantise", "cast"}),
        ("tiny_fp8", {"dtype": "float32"}, {"dequantise", "cast"}),
        ("tiny_fp8", {"dtype": "bf16"}, {"dequantise", "copy"}),
    ],
)
def test_what_is_right_is_found_right(goldens, make, name, options, actions):
    source, result, report = make(goldens / name, **options)
    comparisons = verify(source, result)
    assert {comparison.task.action for comparison in comparisons} == actions
    assert not any(comparison.num_wrong_bytes for comparison in comparisons)
    errors = {c.task.name: c.error.relative_rms for c in comparisons if c.task.is_lossy}
    assert errors == pytest.approx({name: error.relative_rms for name, error in report.errors.items()})


@pytest.mark.parametrize("dtype", [None, "bf16", "fp8"])
def test_one_changed_byte_is_found(goldens, make, dtype):
    source, result, _ = make(goldens / "tiny_text", dtype=dtype)
    name = "model.layers.1.moe.up_proj.weight"
    path = result.tensors[name].path / "0.0.0"
    data = bytearray(path.read_bytes())
    data[777] ^= 0x10
    path.write_bytes(data)
    wrong = {c.task.name: c.num_wrong_bytes for c in verify(source, result) if c.num_wrong_bytes}
    assert wrong == {name: 1}


def test_a_changed_scale_is_found(goldens, make):
    source, result, _ = make(goldens / "tiny_text", dtype="fp8")
    path = result.tensors["model.layers.0.self_attn.wq.weight_scale_inv"].path / "0.0"
    path.write_bytes(bytes(path.stat().st_size))
    wrong = {c.task.name: c.error.relative_rms for c in verify(source, result) if c.num_wrong_bytes}
    assert wrong.keys() == {"model.layers.0.self_attn.wq.weight"}
    assert wrong["model.layers.0.self_attn.wq.weight"] == pytest.approx(1.0)


def test_another_model_is_refused(goldens):
    with pytest.raises(ValueError, match="the result"):
        verify(open_source(goldens / "tiny_text"), open_source(goldens / "tiny_vl"))
    with pytest.raises(ValueError, match="the result lacks"):
        verify(open_source(goldens / "tiny_vl"), open_source(goldens / "tiny_text"))
