"""Safetensors files: what is read equals what others wrote, and damage is named."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from step3_jax.checkpoint.safetensors_io import DTYPES, LazyArray, SafetensorsFile, write_safetensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_reference_library_writes(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, np.int64),
        "c": np.zeros((0, 4), np.float16),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "np"}
        assert set(file.tensors) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)
            assert file.read(name).dtype == array.dtype


def test_reference_library_reads_what_we_write(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
    write_safetensors(tmp_path / "x.safetensors", arrays.items(), {"k": "v"})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_makes_the_round_trip(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(DTYPES[dtype])
    write_safetensors(tmp_path / "x.safetensors", [("x", array)])
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.tensors["x"].dtype == dtype
        assert file.read("x").tobytes() == array.tobytes()


def test_slices_are_views_of_the_map(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    write_safetensors(tmp_path / "x.safetensors", [("x", array)])
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        part = file.read("x", (2, slice(1, 3)))
        np.testing.assert_array_equal(part, array[2, 1:3])
        assert part.base is not None
        assert not part.flags.writeable
    # A view that outlives the file stays readable.
    np.testing.assert_array_equal(part, array[2, 1:3])


def test_unknown_tensor_is_named(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", [("x", np.zeros(1, np.float32))])
    with SafetensorsFile(tmp_path / "x.safetensors") as file, pytest.raises(ValueError, match="no tensor y"):
        file.read("y")


DAMAGE = {
    "unknown dtype": ({"x": entry("F5")}, bytes(8), "dtype is 'F5'"),
    "half a byte too many": ({"x": entry("F4", (3,), (0, 2))}, bytes(2), "needs 1.5 bytes"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "dtype is None"),
    "entry is no object": ({"x": 5}, b"", "entry is int"),
    "negative axis": ({"x": entry(shape=(-2,))}, bytes(8), "shape is"),
    "axis is true": ({"x": entry(shape=(True, 2))}, bytes(8), "shape is"),
    "axis is a fraction": ({"x": entry(shape=(2.0,))}, bytes(8), "shape is"),
    "axes overflow": ({"x": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b"", "shape is"),
    "too many axes": ({"x": entry(shape=(1,) * 40, offsets=(0, 4))}, bytes(4), "shape is"),
    "shape does not fit offsets": ({"x": entry(shape=(3,))}, bytes(8), "needs 12 bytes"),
    "offsets backwards": ({"x": entry(offsets=(8, 0))}, bytes(8), "data_offsets"),
    "one offset": ({"x": entry(offsets=(8,))}, bytes(8), "data_offsets"),
    "data truncated": ({"x": entry()}, bytes(7), "truncated"),
    "data after the end": ({"x": entry()}, bytes(9), "1 bytes after"),
    "hole": ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "leaves 4 bytes unused"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "overlaps"),
    "same place": ({"x": entry(), "y": entry()}, bytes(8), "overlaps"),
    "name twice": (b'{"x": 1, "x": 2}', b"", "'x' appears twice"),
    "header no object": (b"[1]", b"", "damaged"),
    "header no JSON": (b"{", b"", "damaged"),
    "header no UTF-8": (b'{"\xff": 1}', b"", "damaged"),
    "header too deep": (b"[" * 100_000, b"", "damaged"),
    "metadata no strings": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_named(write_raw, what):
    header, data, message = DAMAGE[what]
    path = write_raw(header, data)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("length", "message"), [(10**9, "limit"), (2**64 - 1, "limit"), (1000, "truncated")])
def test_header_length_is_checked_before_anything_is_read(write_raw, length, message):
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(write_raw(b"{}", length=length))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1234567", "truncated"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><title>Sign in</title>", "is an HTML page"),
        (b"PK\x03\x04" + bytes(100), "is a ZIP archive"),
    ],
)
def test_what_lies_in_place_of_the_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F4", (4, 2), 4), ("F6_E2M3", (4,), 3), ("F6_E3M2", (8,), 6), ("F4", (0,), 0)]
)
def test_dtypes_smaller_than_a_byte_are_listed_and_not_read(write_raw, dtype, shape, size):
    path = write_raw({"x": entry(dtype, shape, (0, size)), "y": entry("F32", (1,), (size, size + 4))}, bytes(size + 4))
    with SafetensorsFile(path) as file:
        assert (file.tensors["x"].dtype, file.tensors["x"].num_bytes) == (dtype, size)
        assert file.read("y").tolist() == [0]
        with pytest.raises(ValueError, match=f"tensor x is {dtype}, which cannot be read"):
            file.read("x")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            SafetensorsFile(path)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_any_bytes_give_a_file_or_a_value_error(tmp_path_factory, content, cut):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    header = json.dumps({"x": entry(), "y": entry("U8", (3,), (8, 11))}).encode()
    path.write_bytes((len(header).to_bytes(8, "little") + header + bytes(11))[:cut] + content)
    try:
        with SafetensorsFile(path) as file:
            assert all(file.read(name).shape == info.shape for name, info in file.tensors.items())
    except ValueError as error:
        if str(path) not in str(error):
            raise


def test_pieces_are_written_in_order(tmp_path):
    array = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4)
    lazy = LazyArray(array.shape, array.dtype, lambda: iter(array))
    write_safetensors(tmp_path / "x.safetensors", [("x", lazy)])
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read("x"), array)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("x", np.ones(2, np.float32))])
    before = path.read_bytes()
    short = LazyArray((2, 2), np.dtype(np.float32), lambda: iter([np.zeros(2, np.float32)]))
    with pytest.raises(ValueError, match="pieces of y"):
        write_safetensors(path, [("y", short)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writer_refuses_what_the_format_has_not(tmp_path):
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="given twice"):
        write_safetensors(tmp_path / "x", [("a", one), ("a", one)])
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(tmp_path / "x", [("a", one.astype(np.complex128))])
