"""Sources as other tools write them: dtypes, templates and files next to the weights."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import parameters_of
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.shards import Checkpoint, write_checkpoint
from step3_jax.checkpoint.source import open_source
from step3_jax.checkpoint.verify import verify


def run(source, target, **options):
    return convert(plan_conversion(open_source(source), **options), target)


def tensors_of(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: (info.dtype, checkpoint.read(name).tobytes()) for name, info in checkpoint.tensors.items()}


@pytest.fixture
def source(goldens, tmp_path):
    """A copy of the golden text model, to change."""
    return shutil.copytree(goldens / "tiny_text", tmp_path / "source")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_scales_of_any_dtype_are_converted(goldens, tmp_path, dtype):
    with Checkpoint(goldens / "tiny_fp8") as checkpoint:
        arrays = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
    rounded = {name: array.astype(dtype) if name.endswith("_scale_inv") else array for name, array in arrays.items()}
    source = shutil.copytree(goldens / "tiny_fp8", tmp_path / "source")
    write_checkpoint(source, rounded.items(), max_shard_bytes=10**9)
    run(source, tmp_path / "fp8", form="hf", dtype="fp8")
    run(source, tmp_path / "kept")
    run(tmp_path / "fp8", tmp_path / "bf16", form="hf", dtype="bf16")
    run(source, tmp_path / "direct", form="hf", dtype="bf16")
    assert tensors_of(tmp_path / "bf16") == tensors_of(tmp_path / "direct")
    right = parameters_of(load_model(source, "float32", quantization="none"))
    for name in ("fp8", "kept"):
        for path, parameter in parameters_of(load_model(tmp_path / name, "float32", quantization="none")).items():
            np.testing.assert_array_equal(np.asarray(parameter[...]), np.asarray(right[path][...]))
    comparisons = verify(open_source(source), open_source(tmp_path / "fp8"))
    assert not [comparison for comparison in comparisons if comparison.num_wrong_bytes]


def test_float16_is_converted_with_its_rounding_told(source, tmp_path):
    with Checkpoint(source) as checkpoint:
        arrays = {name: checkpoint.read(name).astype(np.float16) for name in checkpoint.tensors}
    write_checkpoint(source, arrays.items(), max_shard_bytes=10**9)
    report = run(source, tmp_path / "out", form="hf", dtype="bf16")
    assert report.errors.keys() == arrays.keys()
    for name, (_, data) in tensors_of(tmp_path / "out").items():
        assert data == arrays[name].astype(np.float32).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("folder", ["additional_chat_templates", "chat_templates"])
def test_further_chat_templates_travel_along(source, tmp_path, folder):
    (tmp_path / "secret").write_text("not the model's")
    (source / folder).mkdir()
    (source / folder / "tool_use.jinja").write_text("{{ tools }}")
    (source / folder / "link.jinja").symlink_to(tmp_path / "secret")
    assert open_source(source).left_out == (f"{folder}/link.jinja",)
    run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / folder).iterdir()] == ["tool_use.jinja"]


def test_a_pointer_beside_the_weights_does_not_travel_along(source):
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a Git LFS pointer"):
        open_source(source)
