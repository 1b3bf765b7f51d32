"""The Orbax form: Orbax itself restores it, to any sharding and in parts, and it reads as the released layout does."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step3_jax.checkpoint import orbax_io
from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import expected_tensors, parameters_of, released_name
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint, chunk_shape, find_item, restore_parameters
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.checkpoint.source import open_source
from step3_jax.config import ModelConfig
from step3_jax.model.step3 import Step3
from step3_jax.quant import BlockScaled

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODELS = ("tiny_text", "tiny_vl", "tiny_fp8")


@pytest.fixture(scope="module")
def orbax_folders(goldens, tmp_path_factory):
    """The golden models in Orbax form, cut into many chunks."""
    folder = tmp_path_factory.mktemp("orbax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_io, "SMALL_BYTES", 512)
        patch.setattr(orbax_io, "MAX_CHUNK_BYTES", 4096)
        for name in MODELS:
            convert(plan_conversion(open_source(goldens / name)), folder / name)
    return folder


def one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_reads_as_in_the_released_layout(goldens, orbax_folders, name):
    with Checkpoint(goldens / name) as released, OrbaxCheckpoint(orbax_folders / name) as ours:
        assert ours.tensors.keys() == released.tensors.keys()
        for tensor, info in released.tensors.items():
            assert (ours.tensors[tensor].dtype, ours.tensors[tensor].shape) == (info.dtype, info.shape)
            assert ours.read(tensor).tobytes() == released.read(tensor).tobytes()


def test_parts_read_as_numpy_reads_them(goldens, orbax_folders):
    indices = [
        0,
        slice(1, 3),
        (1, slice(3, 40)),
        (slice(None), slice(5, 6), slice(7, 31)),
        (..., slice(2, 9)),
        (-1, ..., 4),
    ]
    name = "model.layers.1.moe.gate_proj.weight"
    with Checkpoint(goldens / "tiny_text") as released, OrbaxCheckpoint(orbax_folders / "tiny_text") as ours:
        for index in indices:
            part, right = ours.read(name, index), released.read(name, index)
            assert part.shape == right.shape
            assert part.tobytes() == right.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_orbax_restores_it_without_being_told_anything(orbax_folders, name):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((orbax_folders / name / "weights").absolute())
    with OrbaxCheckpoint(orbax_folders / name) as ours:
        assert len(jax.tree.leaves(tree)) == len(ours.tensors)
        right = ours.read("model.embed_tokens.weight")
    assert np.asarray(tree["text"]["embed_tokens"]["weight"]).tobytes() == right.tobytes()


def test_orbax_restores_it_into_the_models_own_tree(goldens, orbax_folders):
    config = ModelConfig.load(goldens / "tiny_vl")
    model = nnx.eval_shape(lambda: Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    sharding = one_device()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), nnx.to_pure_dict(state)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((orbax_folders / "tiny_vl" / "weights").absolute(), abstract)
    right = parameters_of(load_model(goldens / "tiny_vl"))
    for path, parameter in parameters_of(nnx.merge(graphdef, restored)).items():
        np.testing.assert_array_equal(parameter[...], right[path][...], err_msg=released_name(path))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", ["stored", "none"])
def test_load_model_takes_it(goldens, orbax_folders, name, quantization):
    right = parameters_of(load_model(goldens / name, quantization=quantization))
    found = parameters_of(load_model(orbax_folders / name, quantization=quantization))
    assert found.keys() == right.keys()
    for path, parameter in found.items():
        values = zip(jax.tree.leaves(parameter.get_value()), jax.tree.leaves(right[path].get_value()), strict=True)
        for value, expected in values:
            assert value.dtype == expected.dtype
            assert np.asarray(value).tobytes() == np.asarray(expected).tobytes()


def test_text_only_leaves_the_tower_on_the_disk(orbax_folders, tmp_path):
    folder = shutil.copytree(orbax_folders / "tiny_vl", tmp_path / "model")
    for entry in (folder / "weights").iterdir():
        if entry.name.startswith(("vision.", "projector.")):
            for chunk in entry.glob("[0-9]*"):
                chunk.unlink()
    model = load_model(folder, text_only=True)
    assert model.vision is None
    assert model.projector is None
    assert model.config.vision is None
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(folder)


def test_one_role_is_restored_alone(orbax_folders, tmp_path):
    folder = shutil.copytree(orbax_folders / "tiny_fp8", tmp_path / "model")
    for entry in (folder / "weights").iterdir():
        if ".ffn." in entry.name:
            for chunk in entry.glob("[0-9]*"):
                chunk.unlink()
    config = ModelConfig.load(folder)
    model = nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(0)))
    role = {path: one_device() for path in parameters_of(model) if "attention" in path}
    restored = restore_parameters(folder, role)
    assert restored.keys() == role.keys()
    assert any(isinstance(value, BlockScaled) for value in restored.values())
    with OrbaxCheckpoint(folder) as ours:
        for path, value in restored.items():
            name = released_name(path)
            if isinstance(value, BlockScaled):
                assert np.asarray(value.scales).tobytes() == ours.read(f"{name}_scale_inv").tobytes()
            stored = value.values if isinstance(value, BlockScaled) else value
            assert np.asarray(stored).tobytes() == ours.read(name).tobytes()


def test_every_sharding_gets_its_parts(orbax_folders, goldens):
    """On eight devices, which must be chosen before jax starts, hence in a separate process."""
    code = """
        import sys, jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from step3_jax.checkpoint.load import load_model
        from step3_jax.checkpoint.names import parameters_of
        from step3_jax.checkpoint.orbax_io import restore_parameters
        right = parameters_of(load_model(sys.argv[2]))
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
        def spec(shape, names):
            free = list(names)
            return P(*(free.pop(0) if free and n % mesh.shape[free[0]] == 0 else None for n in shape))
        for names in (("a", "b"), ("b", "a")):
            shardings = {p: NamedSharding(mesh, spec(v[...].shape, names)) for p, v in right.items()}
            loaded = {p: v[...] for p, v in parameters_of(load_model(sys.argv[1], shardings=shardings)).items()}
            restored = restore_parameters(sys.argv[1], shardings)
            for path, value in right.items():
                for found in (loaded[path], restored[path]):
                    assert found.sharding == shardings[path], path
                    np.testing.assert_array_equal(found, value[...])
        print("equal", len(right))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(orbax_folders / "tiny_vl"), str(goldens / "tiny_vl")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("equal ")


@pytest.mark.parametrize("preset", ["step3", "step3-fp8"])
def test_full_size_chunks_serve_eight_way_meshes(preset):
    config = ModelConfig.preset(preset)
    itemsize = 2 if preset == "step3" else 1
    num_files = 0
    for name, shape in expected_tensors(config).items():
        matrices, rows, columns = chunk_shape(name, shape, itemsize)
        assert matrices * rows * columns * itemsize <= 2**25
        view = (
            shape if len(shape) == 3 else (1, *shape[:1], int(np.prod(shape[1:]))) if len(shape) > 1 else (1, 1, *shape)
        )
        num_files += -(-view[0] // matrices) * -(-view[1] // rows) * (view[2] // columns)
        assert view[2] % columns == 0
    assert num_files < 80_000
    assert chunk_shape("model.layers.4.moe.gate_proj.weight", (48, 5120, 7168), itemsize) == (1, 640, 7168)
    assert chunk_shape("model.layers.4.moe.down_proj.weight", (48, 7168, 5120), itemsize) == (1, 7168, 640)
    assert chunk_shape("model.layers.4.moe.down_proj.weight_scale_inv", (48, 56, 40), 4) == (48, 56, 40)


def test_a_missing_chunk_is_an_error_and_not_zeros(orbax_folders, tmp_path):
    folder = shutil.copytree(orbax_folders / "tiny_text", tmp_path / "model")
    (folder / "weights" / "text.embed_tokens.weight" / "1.0").unlink()
    with pytest.raises(ValueError, match=r"embed_tokens.weight/1\.0 cannot be read: No such file"):
        load_model(folder)


def test_a_truncated_chunk_is_an_error(orbax_folders, tmp_path):
    folder = shutil.copytree(orbax_folders / "tiny_text", tmp_path / "model")
    chunk = folder / "weights" / "text.embed_tokens.weight" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"embed_tokens.weight/1\.0 is truncated"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "list where a JSON object is needed"),
        ("{}", "no tree_metadata"),
        ('{"tree_metadata": {"nonsense": {}}}', "not a list of keys"),
        ('{"tree_metadata": {"[1": {}}}', "not a list of keys"),
        ('{"tree_metadata": {"(\'../../x\',)": {}}}', "only plain names"),
        ("{\"tree_metadata\": {\"('other', 'tree')\": {}}}", "no parameters of Step3"),
        ("{\"tree_metadata\": {\"('text', 'norm', 'weight')\": {}}}", "cannot be read"),
    ],
)
def test_a_damaged_item_is_refused(tmp_path, text, message):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match=message):
        OrbaxCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [{"shape": [-1]}, {"shape": "x"}, {"shape": [2, 3]}, {"chunks": [0]}, {"chunks": None}],
)
def test_a_damaged_array_is_refused(tmp_path, header):
    folder = tmp_path / "weights" / "text.norm.weight"
    folder.mkdir(parents=True)
    entry = "('text', 'norm', 'weight')"
    (tmp_path / "weights" / "_METADATA").write_text(json.dumps({"tree_metadata": {entry: {}}}))
    good = {"shape": [4], "chunks": [4], "dtype": "<f4", "compressor": None, "filters": None, "order": "C"}
    (folder / ".zarray").write_text(json.dumps(good | header))
    with pytest.raises(ValueError, match=r"\.zarray is damaged"):
        OrbaxCheckpoint(tmp_path)


def test_what_is_no_checkpoint_has_no_item(tmp_path):
    assert find_item(tmp_path) is None
    assert find_item(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="has no Orbax checkpoint"):
        OrbaxCheckpoint(tmp_path)


def test_the_newest_step_counts(tmp_path):
    for step in (5, 10, 9):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "state" / "_METADATA").write_text("{}")
    assert find_item(tmp_path) == tmp_path / "checkpoints" / "10" / "state"
    assert find_item(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "10" / "state"
    assert find_item(tmp_path / "checkpoints" / "9") == tmp_path / "checkpoints" / "9" / "state"
