"""Bands and where their bytes are: cuts are complete, what is written is read back, chunks are Zarr's."""

from __future__ import annotations

import dataclasses
import os

import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint.buffer import Buffers
from step3_jax.checkpoint.placement import Band, Placement, as_matrices, cut_bands
from step3_jax.checkpoint.safetensors_io import DTYPES

SHAPES = [(7,), (5, 6), (3, 10, 8), (9, 4, 2, 2), (1, 1), (4, 1, 8)]


def covered(shape, bands):
    """How often each row is in a band."""
    matrices, rows, _ = as_matrices(shape)
    count = np.zeros((matrices, rows), int)
    for band in bands:
        count[band.first : band.last, band.start : band.stop] += 1
    return count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_bytes", [1, 16, 64, 100, 10**6])
@pytest.mark.parametrize("multiple", [1, 4])
def test_bands_cover_each_row_once_and_keep_blocks_together(shape, max_bytes, multiple):
    bands = cut_bands(shape, 2, max_bytes=max_bytes, multiple=multiple)
    assert (covered(shape, bands) == 1).all()
    rows, columns = as_matrices(shape)[1:]
    for band in bands:
        assert band.start % multiple == 0
        assert band.stop % multiple == 0 or band.stop == rows
        assert band.last - band.first == 1 or (band.start, band.stop) == (0, rows)
        size = (band.last - band.first) * (band.stop - band.start) * columns * 2
        assert size <= max(max_bytes, multiple * columns * 2)


def test_a_stack_of_any_size_is_cut_small():
    bands = cut_bands((48, 5120, 7168), 2, max_bytes=2**24, multiple=128)
    assert max((band.stop - band.start) * 7168 * 2 for band in bands) <= 2**24
    assert (covered((48, 5120, 7168), bands) == 1).all()


def make_place(tmp_path, dtype, shape, chunk):
    if chunk is None:
        path = tmp_path / "file"
        path.write_bytes(b"\xff" * 3000)
        return Placement(dtype, shape, path, 24)
    return Placement(dtype, shape, tmp_path, 0, chunk)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((7,), None),
        ((7,), (1, 1, 7)),
        ((10, 8), None),
        ((10, 8), (1, 4, 2)),
        ((10, 8), (1, 3, 8)),
        ((3, 10, 8), None),
        ((3, 10, 8), (1, 10, 4)),
        ((3, 10, 8), (1, 4, 2)),
        ((3, 10, 8), (3, 10, 8)),
        ((3, 10, 8), (2, 10, 8)),
        ((9, 2, 2, 2), (1, 4, 8)),
    ],
)
@pytest.mark.parametrize("max_bytes", [1, 40, 200, 10**6])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_what_is_written_in_some_bands_is_read_in_others(tmp_path, shape, chunk, max_bytes, dtype):
    place = make_place(tmp_path, dtype, shape, chunk)
    values = np.random.default_rng(0).standard_normal(as_matrices(shape)).astype(DTYPES[dtype])
    itemsize = DTYPES[dtype].itemsize
    for band in reversed(cut_bands(shape, itemsize, max_bytes=max_bytes)):
        place.write(band, values[band.first : band.last, band.start : band.stop])
    for size in (30, 10**6):
        for band in cut_bands(shape, itemsize, max_bytes=size):
            part = values[band.first : band.last, band.start : band.stop]
            assert place.read(band).tobytes() == part.tobytes()
            assert all(path.exists() for path in place.files(band))


@pytest.mark.parametrize("chunk", [None, (1, 4, 2)])
def test_buffers_are_used_again_and_hold_the_band(tmp_path, chunk):
    place = make_place(tmp_path, "F32", (3, 10, 8), chunk)
    values = np.random.default_rng(0).random((3, 10, 8), np.float32)
    buffers = Buffers()
    for band in cut_bands((3, 10, 8), 4, max_bytes=100):
        place.write(band, values[band.slices], buffers)
        place.start_writeback(band)
    addresses = set()
    for band in cut_bands((3, 10, 8), 4, max_bytes=100):
        place.start_reading(band)
        found = place.read(band, buffers)
        addresses.add(found.ctypes.data)
        np.testing.assert_array_equal(found, values[band.slices])
    assert len(addresses) == 1
    whole = np.zeros((3, 10, 8), np.float32)
    place.read_into(Band(0, 3, 0, 10), whole)
    np.testing.assert_array_equal(whole, values)


@pytest.mark.parametrize("band", [Band(0, 3, 0, 10), Band(1, 2, 4, 10), Band(2, 3, 8, 9)])
@pytest.mark.parametrize("max_bytes", [1, 70, 10**6])
def test_parts_of_a_band_cover_it_in_order(band, max_bytes):
    values = np.arange(3 * 10 * 8).reshape(3, 10, 8)
    parts = band.cut(8, max_bytes=max_bytes, multiple=4)
    found = np.concatenate([values[part.slices].reshape(-1) for part in parts])
    np.testing.assert_array_equal(found, values[band.slices].reshape(-1))
    inside = [values[band.slices][part.within(band).slices].reshape(-1) for part in parts]
    np.testing.assert_array_equal(np.concatenate(inside), found)
    assert all((part.start - band.start) % 4 == 0 for part in parts)


def test_a_file_is_written_nowhere_but_in_the_band(tmp_path):
    place = make_place(tmp_path, "F32", (4, 5), None)
    place.write(Band(0, 1, 1, 3), np.zeros((1, 2, 5), np.float32))
    data = place.path.read_bytes()
    assert data[: 24 + 20] == b"\xff" * 44
    assert data[44:84] == bytes(40)
    assert data[84:] == b"\xff" * (3000 - 84)


def test_chunk_files_are_full_and_named_as_zarr_names_them(tmp_path):
    place = Placement("BF16", (2, 5, 4), tmp_path, 0, (1, 3, 2))
    values = np.ones((2, 5, 4), ml_dtypes.bfloat16)
    for band in cut_bands((2, 5, 4), 2, max_bytes=10**6):
        place.write(band, values)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{i}.{j}.{k}" for i in range(2) for j in range(2) for k in range(2)}
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {12}


def test_a_truncated_file_is_named(tmp_path):
    place = make_place(tmp_path, "F32", (100, 10), None)
    with pytest.raises(ValueError, match="file is truncated"):
        place.read(Band(0, 1, 0, 100))


def test_a_missing_file_is_named(tmp_path):
    place = dataclasses.replace(make_place(tmp_path, "F32", (4, 5), None), path=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        place.read(Band(0, 1, 0, 4))


def test_writes_that_take_a_part_go_on(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: write(file, bytes(data[:7]), place))
    place = make_place(tmp_path, "F32", (4, 5), None)
    values = np.arange(20, dtype=np.float32).reshape(1, 4, 5)
    place.write(Band(0, 1, 0, 4), values)
    assert place.read(Band(0, 1, 0, 4)).tobytes() == values.tobytes()


def test_a_failed_write_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    place = make_place(tmp_path, "F32", (4, 5), None)
    with pytest.raises(OSError, match="No space left") as error:
        place.write(Band(0, 1, 0, 4), np.zeros((1, 4, 5), np.float32))
    assert error.value.filename == str(place.path)
