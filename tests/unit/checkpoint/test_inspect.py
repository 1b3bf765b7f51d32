"""Inspection: everything wrong is found at once, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint.inspect import Inspection, collapse, inspect_checkpoint
from step3_jax.checkpoint.names import expected_scales, expected_tensors, is_fp8_tensor
from step3_jax.checkpoint.orbax_io import place_arrays, write_item
from step3_jax.checkpoint.placement import Band, as_matrices
from step3_jax.checkpoint.safetensors_io import LazyArray, SafetensorsFile
from step3_jax.checkpoint.shards import INDEX_FILE, write_checkpoint
from step3_jax.config import ModelConfig

BF16, FP8, F32 = (np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32))
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


def write_holes(folder: pathlib.Path, preset: str, change: Callable[[Layout], None] | None = None) -> pathlib.Path:
    """A released layout with holes for data, in shards of 5 GB."""
    config = ModelConfig.preset(preset)
    layout: Layout = {}
    for name, shape in expected_tensors(config).items():
        layout[name] = shape, FP8 if config.quantization and is_fp8_tensor(name) else BF16
    if config.quantization:
        layout |= {name: (shape, F32) for name, shape in expected_scales(config).items()}
    if change is not None:
        change(layout)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = [(name, LazyArray(shape, dtype, None)) for name, (shape, dtype) in layout.items()]
    write_checkpoint(folder, tensors, max_shard_bytes=5 * 10**9)
    return folder


def test_the_released_bf16_layout_fits(tmp_path: pathlib.Path) -> None:
    found = inspect_checkpoint(write_holes(tmp_path, "step3"))
    assert not found.problems
    assert (len(found.tensors), found.num_bytes) == (1663, 641_939_825_664)
    assert found.parameters == {
        "text": 316_294_538_240,
        "vision": 4_285_292_032,
        "projector": 390_082_560,
        "other": 0,
        "total": 320_969_912_832,
    }
    assert found.dtypes == {"BF16": (1663, 641_939_825_664)}
    assert found.num_fp8 == 0
    assert any("holes" in note for note in found.notes)


def test_the_released_fp8_layout_fits(tmp_path: pathlib.Path) -> None:
    found = inspect_checkpoint(write_holes(tmp_path, "step3-fp8"))
    assert not found.problems
    assert found.num_bytes == 327_589_017_984
    assert {name: count for name, (count, _) in found.dtypes.items()} == {"F8_E4M3": 656, "BF16": 1007, "F32": 656}
    assert (found.num_fp8, found.num_quantisable) == (656, 656)
    assert found.parameters["total"] == 320_969_912_832


def test_all_that_is_wrong_is_found_at_once(tmp_path: pathlib.Path) -> None:
    def change(layout: Layout) -> None:
        for layer in range(10, 50):
            del layout[f"model.layers.{layer}.moe.gate.weight"]
        for layer in range(5):
            layout[f"model.layers.{layer}.mystery"] = (2,), BF16
        layout["lm_head.weight"] = (7168, 128815), BF16
        layout["model.norm.weight"] = (7168,), np.dtype(np.int32)
        del layout["model.layers.59.moe.up_proj.weight_scale_inv"]

    problems = inspect_checkpoint(write_holes(tmp_path, "step3-fp8", change)).problems
    missing, extra, shape, dtype = problems.values()
    assert len(missing) == 41  # no list is cut
    assert "model.layers.59.moe.up_proj.weight_scale_inv" in missing
    assert extra == [f"model.layers.{layer}.mystery" for layer in range(5)]
    assert shape == ["lm_head.weight is [7168, 128815], [128815, 7168] needed"]
    assert dtype[0].startswith("model.norm.weight is I32")


def test_lost_and_cut_shards_are_findings_beside_what_they_held(tmp_path: pathlib.Path) -> None:
    folder = write_holes(tmp_path, "step3")
    (folder / "model-00003-of-00173.safetensors").unlink()
    cut = folder / "model-00170-of-00173.safetensors"
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 1)
    found = inspect_checkpoint(folder)
    damaged, missing = found.problems["files damaged"], found.problems["tensors missing"]
    assert any("00003" in line and "No such file" in line for line in damaged)
    assert any("00170" in line and "truncated" in line for line in damaged)
    assert len(found.files) == 171
    assert len(found.tensors) + len(missing) == 1663


def test_a_file_is_checked_for_what_it_holds(tmp_path: pathlib.Path) -> None:
    folder = write_holes(tmp_path, "step3-fp8")
    # The scales come after all weights, in other files.
    for name in ("model-00030-of-00088.safetensors", "model-00088-of-00088.safetensors"):
        found = inspect_checkpoint(folder / name)
        assert not found.problems
        assert 0 < len(found.tensors) < 2000
    (folder / "config.json").unlink()
    alone = inspect_checkpoint(folder / name)
    assert alone.config is None
    assert not alone.problems
    assert any("nothing could be compared" in note for note in alone.notes)


def test_a_wrong_shape_in_one_file_is_found(tmp_path: pathlib.Path) -> None:
    folder = write_holes(tmp_path, "step3", lambda layout: layout.update({"lm_head.weight": ((3,), BF16)}))
    name = json.loads((folder / INDEX_FILE).read_text())["weight_map"]["lm_head.weight"]
    problems = inspect_checkpoint(folder / name).problems
    assert problems == {"tensors of the wrong shape": ["lm_head.weight is [3], [128815, 7168] needed"]}


def test_a_text_only_copy_fits_and_says_so(tmp_path: pathlib.Path) -> None:
    def change(layout: Layout) -> None:
        for name in [name for name in layout if name.startswith(("vision_model.", "vit_"))]:
            del layout[name]

    found = inspect_checkpoint(write_holes(tmp_path, "step3", change))
    assert not found.problems
    assert found.config is not None
    assert found.config.vision is None
    assert any("text-only" in note for note in found.notes)


def test_fp8_tensors_without_quantization_config(goldens: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(goldens / "tiny_fp8", tmp_path / "model")
    assert not inspect_checkpoint(tmp_path / "model").problems
    config = dataclasses.replace(ModelConfig.load(goldens / "tiny_fp8"), quantization=None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    assert "no quantization_config" in inspect_checkpoint(tmp_path / "model").problems["FP8"][0]


def test_a_missing_or_wrong_configuration_is_a_finding(goldens: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(goldens / "tiny_text" / "model.safetensors", tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert "no config.json" in found.problems["config.json"][0]
    assert found.parameters["text"] > 0
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "not a Step3 model" in inspect_checkpoint(tmp_path).problems["config.json"][0]


def test_files_that_are_not_read_are_named(goldens: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(goldens / "tiny_text" / name, tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "old.safetensors")
    assert any("old.safetensors" in note for note in inspect_checkpoint(tmp_path).notes)
    (tmp_path / INDEX_FILE).write_text("{}")
    assert any("the former is read" in note for note in inspect_checkpoint(tmp_path).notes)


@pytest.fixture
def orbax(goldens: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A golden FP8 model in our Orbax form."""
    item = tmp_path / "weights"
    item.mkdir()
    shutil.copy(goldens / "tiny_fp8" / "config.json", tmp_path)
    with SafetensorsFile(goldens / "tiny_fp8" / "model.safetensors") as file:
        places = place_arrays({name: (info.dtype, info.shape) for name, info in file.tensors.items()}, item)
        write_item(places, item)
        for name, place in places.items():
            sizes = as_matrices(place.shape)
            place.write(Band(0, sizes[0], 0, sizes[1]), np.asarray(file.read(name)).reshape(sizes))
    return tmp_path


def test_our_orbax_form_fits(orbax: pathlib.Path, goldens: pathlib.Path) -> None:
    found, source = inspect_checkpoint(orbax), inspect_checkpoint(goldens / "tiny_fp8")
    assert not found.problems
    assert (found.form, source.form) == ("Orbax", "released layout")
    assert found.parameters == source.parameters
    assert found.dtypes == source.dtypes
    assert len(found.files) == len(found.tensors) == len(source.tensors)


def test_lost_and_cut_chunks_are_found(orbax: pathlib.Path) -> None:
    first, second = orbax / "weights" / "text.norm.weight", orbax / "weights" / "text.lm_head.weight"
    next(path for path in first.iterdir() if path.name[0].isdigit()).unlink()
    chunk = next(path for path in second.iterdir() if path.name[0].isdigit())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = inspect_checkpoint(orbax).problems["files damaged"]
    assert len(damaged) == 2
    assert any("text.norm.weight has 0 chunk files, 1 needed" in line for line in damaged)
    assert any(line.startswith(str(chunk)) for line in damaged)


@pytest.mark.parametrize("name", ["none", "none.safetensors", "config.json"])
def test_what_is_no_checkpoint_is_refused(goldens: pathlib.Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"give a model folder or a \.safetensors file"):
        inspect_checkpoint(goldens / "tiny_text" / name)


def test_a_folder_without_weights_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no weights"):
        inspect_checkpoint(tmp_path)


def test_unknown_tensors_count_as_other() -> None:
    config = ModelConfig.preset("step3")
    with_scale = Inspection(pathlib.Path(), config, {}, "Orbax", {}, {}, [])
    assert with_scale.parameters == {"text": 0, "vision": 0, "projector": 0, "other": 0, "total": 0}
    assert with_scale.dtypes == {}


def test_layers_are_brought_together() -> None:
    lines = [f"model.layers.{layer}.moe.x is [1], [2] needed" for layer in (3, 0, 1, 7)]
    assert collapse([*lines, "a", "b.1.c"]) == ["model.layers.{0-1,3,7}.moe.x is [1], [2] needed", "a", "b.1.c"]
    assert collapse([]) == []
