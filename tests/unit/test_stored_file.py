"""Files of a checkpoint that are read whole, and what may be found in place of one."""

from __future__ import annotations

import pytest

from step3_jax.stored_file import describe_stand_in, read_json_object, read_text

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12420648\n"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (POINTER, "Git LFS pointer"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "HTML page"),
        (b"<html><body>403", "HTML page"),
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04archive/data.pkl", "PyTorch"),
    ],
)
def test_a_file_that_is_something_else_is_called_so(start, expected):
    assert expected in (describe_stand_in(start) or "")


@pytest.mark.parametrize("start", [b"{}", b"\0" * 256, b"\x10\0\0\0\0\0\0\0{}", b"{{ '<html>' }}", b"version 2"])
def test_other_files_are_not(start):
    assert describe_stand_in(start) is None


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_text(path) == '{"a": "é"}'
    assert read_json_object(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "Git LFS pointer"),
        (b"", "is empty"),
        ("é".encode("latin-1"), "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a JSON object is needed"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, data, message):
    path = tmp_path / "settings.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"settings\.json.* {message}"):
        read_json_object(path)


def test_without_the_file_there_are_no_settings(tmp_path):
    assert read_json_object(tmp_path / "a.json") == {}
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_json_object(tmp_path / "a.json")
