"""A folder of shards with an index."""

from __future__ import annotations

import json

import numpy as np
import pytest

from step3_jax.checkpoint.safetensors_io import write_safetensors
from step3_jax.checkpoint.shards import INDEX_FILE, Checkpoint, plan_shards, summarise, write_checkpoint

ARRAYS = {name: np.full((4,), value, np.float32) for value, name in enumerate("abc")}


def edit_index(folder, change):
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, ARRAYS.items(), max_shard_bytes=32)
    return tmp_path


def test_shards_are_seen_as_one_set(folder):
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
    assert json.loads((folder / INDEX_FILE).read_text())["metadata"]["total_size"] == 48
    with Checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
        with pytest.raises(ValueError, match="no tensor z"):
            checkpoint.read("z")


def test_one_file_needs_no_index(tmp_path):
    write_checkpoint(tmp_path, ARRAYS.items(), max_shard_bytes=48)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [([1, 1, 1], 2, [(0, 2), (2, 3)]), ([5, 1, 5], 2, [(0, 1), (1, 2), (2, 3)]), ([], 2, [(0, 0)]), ([2], 2, [(0, 1)])],
)
def test_shards_stay_under_the_limit_save_for_one_large_tensor(sizes, limit, shards):
    assert [(shard.start, shard.stop) for shard in plan_shards(sizes, limit)] == shards


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        plan_shards([1], 0)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "C:x", "x\0y"]
)
def test_index_may_not_lead_out_of_the_folder(folder, name):
    edit_index(folder, lambda weight_map: weight_map.update(a=name))
    with pytest.raises(ValueError, match="only plain file names"):
        Checkpoint(folder)


def test_links_in_the_folder_are_followed_wherever_they_lead(folder, tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(library / path.name)
        path.symlink_to(library / path.name)
    with Checkpoint(folder) as checkpoint:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_links_that_lead_nowhere_are_named(folder):
    path = next(folder.glob("*.safetensors"))
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        Checkpoint(folder)


def test_shards_without_an_index_are_known_by_their_names(folder):
    (folder / INDEX_FILE).unlink()
    with Checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == list(ARRAYS)


def test_missing_shards_are_told_where_there_is_no_index(folder):
    (folder / INDEX_FILE).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"1 of the 2 shards .*: model-00001-of-00002\.safetensors; download the others"
    ):
        Checkpoint(folder)


def test_weights_that_are_no_whole_set_are_named(tmp_path, folder):
    (folder / INDEX_FILE).unlink()
    write_safetensors(folder / "other-00001-of-00001.safetensors", ARRAYS.items())
    with pytest.raises(ValueError, match=r"no weights.*there are model-00001-of-00002\.safetensors, .*other-00001"):
        Checkpoint(folder)


def test_an_index_with_a_byte_order_mark_is_read(folder):
    path = folder / INDEX_FILE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with Checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 3


def test_a_pointer_in_place_of_the_index_is_called_one(folder):
    (folder / INDEX_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"index\.json cannot be read: it is a Git LFS pointer"):
        Checkpoint(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_checkpoint(snapshot, ARRAYS.items(), max_shard_bytes=32)
    for path in snapshot.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    with Checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("c"), ARRAYS["c"])


def test_all_disagreements_of_index_and_shards_are_listed(folder):
    def change(weight_map):
        weight_map["ghost"] = weight_map["a"]
        del weight_map["c"]
        weight_map["other"] = "missing.safetensors"
        weight_map["third"] = "model-00002-of-00002.safetensors"

    edit_index(folder, change)
    with pytest.raises(ValueError, match="damaged") as error:
        Checkpoint(folder)
    for part in ("ghost", "tensor c of", "missing.safetensors cannot be read"):
        assert part in str(error.value)


def test_every_truncated_shard_is_listed(folder):
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00001.*truncated.*model-00002.*truncated"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    write_safetensors(folder / "model-00002-of-00002.safetensors", ARRAYS.items())
    with pytest.raises(ValueError, match="tensor a is in"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_useless_index(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        Checkpoint(tmp_path)


def test_long_lists_are_cut():
    text = summarise("missing", [f"t{number}" for number in range(25)])
    assert text.startswith("25 missing: t0, t1")
    assert text.endswith("t19 ... and 5 more")
