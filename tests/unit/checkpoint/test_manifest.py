"""The record of a conversion: it survives a kill at any byte, and refuses anything that differs."""

from __future__ import annotations

import os

import pytest

from step3_jax.checkpoint.manifest import Manifest, Record
from step3_jax.checkpoint.transform import BandError

ABOUT = {"options": {"--to": "hf", "--dtype": None}, "source": {"model.safetensors": "abc", "config.json": "def"}}
FIRST = Record("a", 0, (1, 2), BandError(0.5, 1.25, 3.5))
SECOND = Record("a", 1, (3,))


@pytest.fixture
def path(tmp_path):
    with Manifest(tmp_path / "manifest.jsonl", ABOUT) as manifest:
        manifest.mark_laid_out()
        manifest.add(FIRST)
        manifest.mark_synced()
        manifest.add(SECOND)
    return tmp_path / "manifest.jsonl"


def test_what_was_added_is_there_again(path):
    with Manifest(path, ABOUT) as manifest:
        assert manifest.is_laid_out
        assert manifest.records == {("a", 0): FIRST, ("a", 1): SECOND}
        assert manifest.unsynced == {("a", 1): SECOND}


def test_a_line_cut_off_anywhere_costs_that_line_alone(path):
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(data)):
        path.write_bytes(data[:end])
        with Manifest(path, ABOUT) as manifest:
            assert manifest.records == {("a", 0): FIRST}
            manifest.add(SECOND)
        assert path.read_bytes() == data


def test_half_a_first_line_is_a_new_record(path):
    path.write_bytes(path.read_bytes()[:30])
    with Manifest(path, ABOUT) as manifest:
        assert not manifest.records
        assert not manifest.is_laid_out
    with Manifest(path, ABOUT):
        pass


def test_the_newer_line_stands(path):
    with Manifest(path, ABOUT) as manifest:
        manifest.forget(SECOND)
        assert manifest.records == {("a", 0): FIRST}
        manifest.add(Record("a", 1, (4,)))
    with Manifest(path, ABOUT) as manifest:
        assert manifest.records["a", 1].checksums == (4,)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (ABOUT | {"options": {"--to": "hf", "--dtype": "fp8"}}, r"another options: --dtype \(was None, is fp8\)"),
        (ABOUT | {"source": {"model.safetensors": "x", "config.json": "def"}}, "another source: model.safetensors"),
        (ABOUT | {"source": {"config.json": "def"}}, "another source: model.safetensors"),
    ],
)
def test_another_conversion_is_refused_with_what_differs(path, about, message):
    with pytest.raises(ValueError, match=message):
        Manifest(path, about)


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b'{"tensor": "a"}\n', b'{"tensor": 1, "band": "x"}\n'])
def test_a_damaged_line_is_refused(path, line):
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*data[:2], line, *data[2:]]))
    with pytest.raises(ValueError, match="is damaged"):
        Manifest(path, ABOUT)


def test_one_process_at_a_time(path):
    with Manifest(path, ABOUT), pytest.raises(ValueError, match="another process"):
        Manifest(path, ABOUT)
    with Manifest(path, ABOUT):
        pass


def test_a_full_disk_leaves_no_half_line(path, monkeypatch):
    before = path.read_bytes()
    with Manifest(path, ABOUT) as manifest:
        write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, data[:5]))
            with pytest.raises(OSError, match="No space left"):
                manifest.add(Record("b", 0, ()))
        assert path.read_bytes() == before
        manifest.add(Record("c", 0, (7,)))
    with Manifest(path, ABOUT) as manifest:
        assert ("c", 0) in manifest.records
        assert ("b", 0) not in manifest.records
