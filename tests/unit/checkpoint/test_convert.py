"""Conversion: the same bytes back, dtypes as the loader makes them, clear errors, bounded memory."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from step3_jax.checkpoint import convert as conversion
from step3_jax.checkpoint.convert import convert, partial_folder
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import expected_scales, expected_tensors, parameters_of
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.safetensors_io import LazyArray, write_safetensors
from step3_jax.checkpoint.shards import Checkpoint, write_checkpoint
from step3_jax.checkpoint.source import open_source
from step3_jax.config import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parents[3]


def run(source, target, *, companions=None, resume=False, workers=2, max_memory=None, **options):
    plan = plan_conversion(open_source(source, companions), **options)
    return convert(plan, target, resume=resume, num_workers=workers, max_memory=max_memory)


def tensors_of(folder):
    with Checkpoint(folder) as checkpoint:
        return {
            name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.tensors.items()
        }


@pytest.fixture
def bf16_folder(goldens, tmp_path):
    """The golden text model in BF16, with other files next to it."""
    folder = tmp_path / "bf16"
    run(goldens / "tiny_text", folder, form="hf", dtype="bf16")
    (folder / "tokenizer.json").write_text('{"some": "tokenizer"}')
    (folder / "chat_template.jinja").write_text("{{ template }}")
    return folder


@pytest.mark.parametrize("name", ["tiny_text", "tiny_vl", "tiny_fp8", "bf16"])
def test_there_and_back_gives_the_same_bytes(goldens, bf16_folder, tmp_path, name):
    source = bf16_folder if name == "bf16" else goldens / name
    run(source, tmp_path / "orbax", unit_bytes=5000)
    run(tmp_path / "orbax", tmp_path / "back", unit_bytes=3000, shard_bytes=100_000)
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    beside = [path for path in source.iterdir() if path.suffix != ".safetensors" and "index" not in path.name]
    assert len(beside) >= 2
    for path in beside:
        for folder in ("orbax", "back"):
            assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_are_no_larger_than_asked_and_the_index_fits(goldens, tmp_path):
    run(goldens / "tiny_vl", tmp_path / "out", form="hf", shard_bytes=120_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    for shard in (tmp_path / "out").glob("*.safetensors"):
        held = [len(tensors[name][2]) for name, file in index["weight_map"].items() if file == shard.name]
        assert sum(held) <= 120_000 or len(held) == 1


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_fp8_dequantises_as_the_loader_does(goldens, tmp_path, form, dtype):
    run(goldens / "tiny_fp8", tmp_path / "out", form=form, dtype=dtype, unit_bytes=9000)
    wanted = {"bf16": "bfloat16", "float32": "float32"}[dtype]
    right = parameters_of(load_model(goldens / "tiny_fp8", wanted, quantization="none"))
    model = load_model(tmp_path / "out")
    assert model.config.dtype == wanted
    assert model.config.quantization is None
    for path, parameter in parameters_of(model).items():
        assert np.asarray(parameter[...]).tobytes() == np.asarray(right[path][...]).tobytes()


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_fp8_is_the_released_layout(bf16_folder, tmp_path, form):
    report = run(bf16_folder, tmp_path / "out", form=form, dtype="fp8", unit_bytes=9000)
    config = ModelConfig.load(tmp_path / "out")
    assert config.quantization is not None
    assert config.quantization.weight_block_size == (128, 128)
    text = dataclasses.replace(config, vision=None)
    with Checkpoint(tmp_path / "out") if form == "hf" else OrbaxCheckpoint(tmp_path / "out") as checkpoint:
        scales = {name for name in checkpoint.tensors if name.endswith("_scale_inv")}
        assert scales == expected_scales(text).keys()
        for name in checkpoint.tensors.keys() - scales:
            assert checkpoint.tensors[name].dtype == ("F8_E4M3" if f"{name}_scale_inv" in scales else "BF16")
        with Checkpoint(bf16_folder) as source:
            for name in scales:
                exact = source.read(name.removesuffix("_scale_inv")).astype(np.float32)
                largest = np.abs(exact).max(axis=(-2, -1)).reshape(-1)
                if exact.shape[-2] <= 128 and exact.shape[-1] <= 128:
                    np.testing.assert_array_equal(checkpoint.read(name).reshape(-1), largest / np.float32(448))
    assert {f"{name}_scale_inv" for name in report.errors} == scales
    assert all(0.01 < error.relative_rms < 0.04 for error in report.errors.values())
    logits = [
        load_model(folder, "float32", quantization="none")(jnp.arange(8)[None])
        for folder in (bf16_folder, tmp_path / "out")
    ]
    assert 0 < float(jnp.abs(logits[0] - logits[1]).max()) < 0.5 * float(jnp.abs(logits[0]).max())


def test_the_result_does_not_depend_on_units_workers_or_the_way(bf16_folder, tmp_path):
    run(bf16_folder, tmp_path / "a", form="hf", dtype="fp8", unit_bytes=10**9, workers=1)
    run(bf16_folder, tmp_path / "b", dtype="fp8", unit_bytes=1, workers=4)
    run(tmp_path / "b", tmp_path / "c")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "c")


def test_config_keeps_what_it_does_not_know(bf16_folder, tmp_path):
    values = json.loads((bf16_folder / "config.json").read_text()) | {"some_key": {"of": ["another", 1]}}
    (bf16_folder / "config.json").write_text(json.dumps(values))
    run(bf16_folder, tmp_path / "fp8", form="hf", dtype="fp8")
    changed = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert changed["some_key"] == values["some_key"]
    assert changed["quantization_config"]["quant_method"] == "fp8"
    run(tmp_path / "fp8", tmp_path / "back", form="hf", dtype="bf16")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values


def test_what_training_saves_is_exported(goldens, tmp_path):
    """As `train.loop` saves it: parameters and the optimiser's moments, which have the same names."""
    model = load_model(goldens / "tiny_text")
    params = {"model": nnx.to_pure_dict(nnx.split(model)[1]), "heads": {"thing": jnp.ones((3, 4))}}
    moments = jax.tree.map(jnp.zeros_like, params)
    state = {"params": params, "optimizer": ({"mu": moments, "nu": moments},), "step": jnp.ones((), jnp.int32)}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute(), options=options) as manager:
        for step in (1, 20):
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    with pytest.raises(ValueError, match="--companions"):
        run(tmp_path / "run", tmp_path / "out")
    run(tmp_path / "run", tmp_path / "out", companions=goldens / "tiny_text", unit_bytes=3000)
    assert tensors_of(tmp_path / "out") == tensors_of(goldens / "tiny_text")
    run(tmp_path / "run", tmp_path / "ours", companions=goldens / "tiny_text", form="orbax")
    run(tmp_path / "ours", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(goldens / "tiny_text")


def test_hidden_large_and_foreign_files_stay(bf16_folder, tmp_path):
    (tmp_path / "secret").write_text("not the model's")
    (bf16_folder / "link.json").symlink_to(tmp_path / "secret")
    (bf16_folder / "examples").mkdir()
    (bf16_folder / ".cache").write_text("")
    (bf16_folder / "pytorch_model.bin").write_text("")
    assert open_source(bf16_folder).left_out == ("examples", "link.json")
    run(bf16_folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"weights", "config.json", "tokenizer.json", "chat_template.jinja", "golden.npz", "README.md"}


def test_a_target_that_is_there_is_refused(goldens, tmp_path):
    (tmp_path / "out").mkdir()
    run(goldens / "tiny_text", tmp_path / "out")  # An empty folder is no loss.
    for resume in (False, True):
        with pytest.raises(ValueError, match="out exists"):
            run(goldens / "tiny_vl", tmp_path / "out", resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists"):
        run(goldens / "tiny_text", tmp_path / "file")


def test_resuming_what_is_done_does_nothing(goldens, tmp_path):
    assert run(goldens / "tiny_text", tmp_path / "out", resume=True).bytes_read > 0
    assert run(goldens / "tiny_text", tmp_path / "out", resume=True).bytes_read == 0


class Stop(Exception):
    """Raised by a test to stop a conversion."""


@pytest.fixture
def stopped(goldens, tmp_path, monkeypatch):
    """A conversion of a copy of the golden text model, stopped half-way; returns source and target."""
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(goldens / "tiny_text", source)
    stop_after(monkeypatch, 60, Stop())
    with pytest.raises(Stop):
        run(source, target, unit_bytes=4096, workers=1)
    monkeypatch.undo()
    assert not target.exists()
    return source, target


def stop_after(monkeypatch, count, error):
    write = os.pwrite
    calls = iter(range(10**6))

    def fail(*args):
        if next(calls) >= count:
            raise error
        return write(*args)

    monkeypatch.setattr(os, "pwrite", fail)


def test_an_unfinished_conversion_is_not_overwritten(stopped):
    source, target = stopped
    with pytest.raises(ValueError, match=r"out\.partial holds an unfinished conversion: continue it with --resume"):
        run(source, target, unit_bytes=4096)
    report = run(source, target, unit_bytes=4096, resume=True)
    assert 0 < report.bytes_read < report.num_bytes
    run(target, target.with_name("back"))
    assert tensors_of(target.with_name("back")) == tensors_of(source)
    assert not partial_folder(target).exists()


def test_an_unfinished_result_does_not_load(stopped):
    _, target = stopped
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(partial_folder(target) / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp8"}, r"--dtype \(was None, is fp8\)"), ({"form": "hf"}, r"--to \(was orbax, is hf\)")],
)
def test_other_options_than_before_are_refused(stopped, options, message):
    source, target = stopped
    with pytest.raises(ValueError, match=message):
        run(source, target, unit_bytes=4096, resume=True, **options)


def test_a_changed_source_is_refused(stopped):
    source, target = stopped
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(ValueError, match=r"another source: model\.safetensors"):
        run(source, target, unit_bytes=4096, resume=True)


def test_what_did_not_reach_the_disk_is_done_again(stopped):
    """Power lost: the record has lines whose data are zeros, or gone."""
    source, target = stopped
    chunks = sorted((partial_folder(target) / "data" / "weights").glob("*/[0-9]*"))
    assert len(chunks) > 5
    chunks[0].write_bytes(bytes(chunks[0].stat().st_size))
    chunks[1].unlink()
    chunks[2].write_bytes(b"short")
    run(source, target, unit_bytes=4096, resume=True)
    run(target, target.with_name("back"))
    assert tensors_of(target.with_name("back")) == tensors_of(source)


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_full_disk_is_told_and_the_rest_is_kept(goldens, tmp_path, monkeypatch, form):
    with monkeypatch.context() as patch:
        stop_after(patch, 50, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match=r"No space left on device; what is done is kept in .*--resume") as error:
            run(goldens / "tiny_text", tmp_path / "out", form=form, dtype="fp8", unit_bytes=4096)
    assert error.value.errno == errno.ENOSPC
    assert "out.partial" in str(error.value.filename)
    report = run(goldens / "tiny_text", tmp_path / "out", form=form, dtype="fp8", unit_bytes=4096, resume=True)
    assert report.bytes_read < 1_000_000
    run(goldens / "tiny_text", tmp_path / "right", form=form, dtype="fp8", unit_bytes=4096)
    for path in (tmp_path / "right").rglob("*"):
        if path.is_file():
            found = tmp_path / "out" / path.relative_to(tmp_path / "right")
            assert found.read_bytes() == path.read_bytes(), path.name


def test_too_little_space_is_told_before_anything_is_written(goldens, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for _ in range(2):
        with pytest.raises(OSError, match=r"the result needs \d+\.\d [kM]B, but 1\.0 kB are free; nothing was written"):
            run(goldens / "tiny_text", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_before_anything_is_done_leaves_nothing_behind(goldens, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "manifest.jsonl")

    with monkeypatch.context() as full:
        full.setattr("step3_jax.checkpoint.convert._lay_out", refuse)
        with pytest.raises(OSError, match="No space left on device; nothing was written"):
            run(goldens / "tiny_text", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    run(goldens / "tiny_text", tmp_path / "out")


def test_a_target_that_another_process_writes_is_not_said_to_be_in_the_way(stopped):
    source, target = stopped
    with (partial_folder(target) / "manifest.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"out\.partial is being written by another process; wait") as error:
                run(source, target, unit_bytes=4096, resume=resume)
            assert "remove" not in str(error.value)


def test_a_target_that_cannot_be_written_is_told(goldens, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"Read-only file system; nothing was written to .*out\.partial"):
        run(goldens / "tiny_text", tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_vanishes_is_told_and_the_rest_is_kept(goldens, tmp_path, monkeypatch):
    source = shutil.copytree(goldens / "tiny_text", tmp_path / "source")
    do_unit = conversion.do_unit
    calls = iter(range(10**6))

    def vanish(*args):
        if next(calls) == 30:
            (source / "model.safetensors").rename(source / "away")
        return do_unit(*args)

    monkeypatch.setattr(conversion, "do_unit", vanish)
    with pytest.raises(FileNotFoundError, match="No such file or directory; what is done is kept") as error:
        run(source, tmp_path / "out", unit_bytes=4096)
    assert str(error.value.filename).endswith("model.safetensors")
    (source / "away").rename(source / "model.safetensors")
    run(source, tmp_path / "out", unit_bytes=4096, resume=True)
    run(tmp_path / "out", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(goldens / "tiny_text")


def test_a_shard_that_is_cut_short_meanwhile_is_told(goldens, tmp_path, monkeypatch):
    source = shutil.copytree(goldens / "tiny_text", tmp_path / "source")
    do_unit = conversion.do_unit
    calls = iter(range(10**6))

    def cut(*args):
        if next(calls) == 30:
            os.truncate(source / "model.safetensors", 200_000)
        return do_unit(*args)

    monkeypatch.setattr(conversion, "do_unit", cut)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: .*what is done is kept in .*--resume"):
        run(source, tmp_path / "out", unit_bytes=4096)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile_gives_no_result(goldens, tmp_path, monkeypatch):
    source = shutil.copytree(goldens / "tiny_text", tmp_path / "source")
    do_unit = conversion.do_unit

    def touch(*args):
        os.utime(source / "model.safetensors", ns=(0, 0))
        return do_unit(*args)

    monkeypatch.setattr(conversion, "do_unit", touch)
    with pytest.raises(ValueError, match="changed while it was read"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corrupted_header_is_told_before_anything_is_written(goldens, tmp_path):
    source = shutil.copytree(goldens / "tiny_text", tmp_path / "source")
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(9)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"model\.safetensors: its header is damaged"):
        run(source, tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


def test_a_model_that_is_not_whole_is_told_before_anything_is_written(goldens, tmp_path):
    source = shutil.copytree(goldens / "tiny_text", tmp_path / "source")
    with Checkpoint(source) as checkpoint:
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
    del tensors["lm_head.weight"]
    write_safetensors(source / "model.safetensors", tensors.items())
    with pytest.raises(ValueError, match=r"1 tensors missing: lm_head\.weight"):
        run(source, tmp_path / "out")


def test_values_that_are_not_finite_name_their_tensor(bf16_folder, tmp_path):
    with Checkpoint(bf16_folder) as checkpoint:
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
    tensors["model.layers.1.moe.up_proj.weight"][2, 3, 4] = ml_dtypes.bfloat16(np.nan)
    write_safetensors(bf16_folder / "model.safetensors", tensors.items())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.moe\.up_proj\.weight: NaN or infinite"):
        run(bf16_folder, tmp_path / "out", dtype="fp8")


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "there is no folder"), ("file", "is a file"), ("empty", "holds no weights: neither")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, folder, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "pickle"}, "allowed: orbax, hf"),
        ({"dtype": "int8"}, "allowed: bf16, fp8, float32"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"workers": 0}, "at least 1"),
        ({"max_memory": 10**7}, r"--max-memory is 10 MiB; this conversion needs at least \d+ MiB"),
    ],
)
def test_options_out_of_range_are_refused(goldens, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(goldens / "tiny_text", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_holds_a_model_can_convert_one(goldens, tmp_path, monkeypatch):
    monkeypatch.setattr("step3_jax.checkpoint.convert.anonymous_bytes", lambda: 2**35)
    assert run(goldens / "tiny_text", tmp_path / "out").num_tensors > 0
    with pytest.raises(ValueError, match=r"this conversion needs at least 32\d\d\d MiB"):
        run(goldens / "tiny_text", tmp_path / "other", max_memory=2**32)


@pytest.mark.thorough
def test_memory_stays_in_its_budget(tmp_path):
    """2.3 GB with tensors of 590 MB, in 440 MiB, what the program itself takes included."""
    config = ModelConfig.preset("step3")
    text = dataclasses.replace(config.text, num_hidden_layers=1, moe_layers=(0,), moe_num_experts=8, vocab_size=1024)
    config = dataclasses.replace(config, text=text, vision=None, bos_token_id=0, eos_token_id=1)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_dict()))
    shapes = expected_tensors(config)
    holes = [(name, LazyArray(shape, np.dtype(ml_dtypes.bfloat16), None)) for name, shape in shapes.items()]
    write_checkpoint(source, holes, max_shard_bytes=10**9)
    budget = 440 * 2**20
    total = sum(path.stat().st_size for path in source.iterdir())
    assert total > 5 * budget
    code = """
        import sys, threading, time
        from step3_jax.checkpoint.convert import convert
        from step3_jax.checkpoint.memory import anonymous_bytes
        from step3_jax.checkpoint.plan import plan_conversion
        from step3_jax.checkpoint.source import open_source
        most = 0
        def watch():
            global most
            while True:
                most = max(most, anonymous_bytes())
                time.sleep(0.002)
        threading.Thread(target=watch, daemon=True).start()
        convert(plan_conversion(open_source(sys.argv[1]), dtype="fp8"), sys.argv[2], max_memory=int(sys.argv[3]))
        print(most)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(source), str(tmp_path / "out"), str(budget)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < budget
    shutil.rmtree(tmp_path / "out")
