"""Files that anyone could have written: whatever they contain, they open or are refused with a ValueError.

Nothing outside a file is read, nothing outside the folder is opened, and memory stays in proportion to the header.
`tools/fuzz_safetensors.py` does the same guided by coverage, for hours if wanted.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step3_jax.checkpoint.inspect import inspect_checkpoint
from step3_jax.checkpoint.safetensors_io import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, write_safetensors
from step3_jax.checkpoint.shards import INDEX_FILE, Checkpoint, write_checkpoint
from step3_jax.config import ModelConfig

SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64, 10**400, -(2**63)]),
    st.sampled_from([1.0, 0.5, math.nan, math.inf, True, False, None, "8", [], {}]),
)
NAMES = st.one_of(
    st.sampled_from(["a", "b", "", "__metadata__", "model.norm.weight", "\x1b[2J", "\ud800", "x" * 1001, "a\nb", "é"]),
    st.text(max_size=5),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
DTYPE = st.sampled_from([*DTYPES, "F4", "", 5])
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"dtype": DTYPE, "shape": st.lists(SIZES, max_size=4), "data_offsets": st.lists(SIZES, max_size=3)}
    ),
    st.fixed_dictionaries({}, optional={"dtype": JUNK, "shape": JUNK, "data_offsets": JUNK, "more": JUNK}),
    JUNK,
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    """A valid header and its bytes of data, with a few of its values replaced."""
    header: dict[str, object] = {}
    position = 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stop = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else []:
        entry = header[name]
        assert isinstance(entry, dict)
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        # The second time it may no longer be a list.
        if isinstance(entry[key], list) and entry[key]:
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(SIZES)
        else:
            entry[key] = draw(JUNK)
    return header, position


def check_message(message: str, path: pathlib.Path, limit: int) -> None:
    """A refusal names the file or folder, and cannot be made to flood or steer the terminal."""
    assert str(path) in message
    assert len(message) < limit
    assert message.isprintable()


def check(path: pathlib.Path) -> None:
    """Opens a file; if it opens, every tensor is inside it, apart from the others, and is exactly its bytes."""
    content = path.read_bytes()
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        check_message(str(error), path, len(str(path)) * 2 + 3000)
        return
    with file:
        end = 8 + int.from_bytes(content[:8], "little")
        for name, info in file.tensors.items():
            assert info.start == end, "tensors follow each other without a gap or an overlap"
            assert info.stop <= len(content)
            end = info.stop
            array = np.array(file.read(name))
            assert array.shape == info.shape
            assert array.tobytes() == content[info.start : info.stop]
        assert end == len(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fuzz")


def write(folder: pathlib.Path, header: bytes, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    path = folder / "x.safetensors"
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


@SETTINGS
@given(layouts(), st.integers(-8, 8))
def test_headers_with_a_few_wrong_values(
    folder: pathlib.Path, layout: tuple[dict[str, object], int], more: int
) -> None:
    header, size = layout
    check(write(folder, json.dumps(header).encode(), bytes(index % 251 for index in range(max(0, size + more)))))


@SETTINGS
@given(st.dictionaries(NAMES, ENTRIES, max_size=4), st.binary(max_size=40))
def test_headers_of_any_json(folder: pathlib.Path, header: dict[str, object], data: bytes) -> None:
    check(write(folder, json.dumps(header).encode(), data))


@SETTINGS
@given(layouts(), st.data())
def test_headers_with_changed_bytes(
    folder: pathlib.Path, layout: tuple[dict[str, object], int], data: st.DataObject
) -> None:
    header, size = layout
    content = bytearray(write(folder, json.dumps(header).encode(), bytes(size)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "x.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    check(path)


DEEP = [50, 300, 600, 900, 1000, 5000, 100_000]


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("place", ['{"a": %s}', '{"a": {"dtype": %s}}', '{"a": {"dtype": "U8", "shape": %s}}', "%s"])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused_at_any_depth(
    folder: pathlib.Path, place: str, brackets: tuple[str, str], depth: int
) -> None:
    nested = brackets[0] * depth + "1" + brackets[1] * depth
    path = write(folder, (place % nested).encode())
    check(path)
    with pytest.raises(ValueError, match=str(path)):
        SafetensorsFile(path)


@pytest.mark.parametrize("digits", [19, 20, 4299, 4300, 4301, 100_000])
def test_endless_numbers_are_refused(folder: pathlib.Path, digits: int) -> None:
    big = "9" * digits
    for shape, offsets in ((f"[{big}]", f"[0, {big}]"), (f"[{big}, 0]", "[0, 0]"), ("[8]", f"[{big[:-1]}1, {big}]")):
        path = write(folder, f'{{"a": {{"dtype": "U8", "shape": {shape}, "data_offsets": {offsets}}}}}'.encode())
        check(path)
        with pytest.raises(ValueError, match=str(path)):
            SafetensorsFile(path)


HOSTILE = {
    "empty lists": b'{"a": [' + b"[]," * 60_000 + b"[]]}",
    "empty objects": b'{"a": [' + b"{}," * 60_000 + b"{}]}",
    "small entries": b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b"}",
    "one name again and again": b"{" + b'"a":1,' * 30_000 + b'"a":1}',
    "a name at the end again": b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b',"29999":1}',
    "a long name": b'{"' + b"a" * 200_000 + b'": {}}',
    "a long dtype": b'{"a": {"dtype": "' + b"a" * 200_000 + b'"}}',
    "many axes": b'{"a": {"dtype": "U8", "shape": [' + b"1," * 90_000 + b'1], "data_offsets": [0, 1]}}',
    "blanks": b" " * 200_000,
    "zeros": bytes(200_000),
    "surrogates": b'{"a": "' + b"\\ud800" * 30_000 + b'"}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_memory_stays_in_proportion_to_the_header(folder: pathlib.Path, what: str) -> None:
    path = write(folder, HOSTILE[what])
    check(path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=str(path)):
            SafetensorsFile(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # With a header of the largest size allowed that is below a GB.
    assert peak < 50 * len(HOSTILE[what]), f"{peak / len(HOSTILE[what]):.0f} times the header"
    assert MAX_HEADER_BYTES * 50 < 2**30


def test_a_long_header_is_not_even_read(folder: pathlib.Path) -> None:
    path = write(folder, b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, 2**40)  # a hole: no disk is taken
    with pytest.raises(ValueError, match="limit"):
        SafetensorsFile(path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX_FILE])
def test_pipes_and_links_to_devices_are_not_waited_for(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint(tmp_path)


# --- the index


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two shards and, next to the folder, a file that no index may reach."""
    folder = tmp_path_factory.mktemp("outer") / "model"
    folder.mkdir()
    write_checkpoint(folder, [(name, np.arange(4, dtype=np.float32)) for name in "abc"], max_shard_bytes=32)
    write_safetensors(folder.parent / "secret.safetensors", [("secret", np.zeros(2, np.float32))])
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "inner.safetensors").symlink_to(folder / "model-00001-of-00002.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return folder


FILE_NAMES = st.one_of(
    st.sampled_from(
        [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        + ["../secret.safetensors", "link.safetensors", "loop.safetensors", "pipe.safetensors", "folder.safetensors"]
        + ["inner.safetensors", "..", ".", "", "/etc/passwd", "a/../../secret.safetensors", "x" * 300, "\ud800", "\0"]
        + ["..\\secret.safetensors", "C:secret", "~", "é" * 200, "\x1b]0;", "model-00001-of-00002.safetensors\n"]
    ),
    st.text(max_size=6),
    JUNK,
)
INDEXES = st.one_of(
    st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abcd") | NAMES, FILE_NAMES, max_size=4)}),
    st.fixed_dictionaries({"weight_map": JUNK}),
    JUNK,
).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30)


def check_index(folder: pathlib.Path, text: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(text)
    try:
        checkpoint = Checkpoint(folder)
    except ValueError as error:
        check_message(str(error), folder, 20_000)
        return
    with checkpoint:
        assert checkpoint.tensors.keys() <= set("abc"), "a tensor from outside the folder"
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(checkpoint.read(name), np.arange(4))


@SETTINGS
@given(INDEXES)
def test_an_index_opens_files_of_its_folder_or_is_refused(sharded: pathlib.Path, text: bytes) -> None:
    check_index(sharded, text)


@pytest.mark.parametrize("depth", DEEP)
def test_a_deep_index_is_refused(sharded: pathlib.Path, depth: int) -> None:
    for nested in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        for place in ("%s", '{"weight_map": %s}', '{"weight_map": {"a": %s}}'):
            check_index(sharded, (place % nested).encode())
            with pytest.raises(ValueError, match="index"):
                Checkpoint(sharded)


def test_a_name_twice_in_an_index_is_refused(sharded: pathlib.Path) -> None:
    file = "model-00001-of-00002.safetensors"
    (sharded / INDEX_FILE).write_text(
        f'{{"weight_map": {{"a": "{file}", "b": "{file}", "a": "../secret.safetensors"}}}}'
    )
    with pytest.raises(ValueError, match="'a' appears twice"):
        Checkpoint(sharded)


def test_a_huge_index_is_not_read(sharded: pathlib.Path) -> None:
    (sharded / INDEX_FILE).write_text("{}")
    os.truncate(sharded / INDEX_FILE, 2**40)
    with pytest.raises(ValueError, match="more than"):
        Checkpoint(sharded)


def test_all_damaged_files_of_a_hostile_index_are_a_bounded_message(sharded: pathlib.Path) -> None:
    weight_map = {f"t{number}": f"{number}.safetensors" for number in range(2000)}
    check_index(sharded, json.dumps({"weight_map": weight_map}).encode())


# --- the configuration, as far as `inspect` needs it


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": {"num_hidden_layers": 10**12}},
        {"vision_config": {"num_hidden_layers": 10**12}},
        {"text_config": {"num_hidden_layers": -1}},
        {"text_config": {"hidden_size": 10**400}},
        {"text_config": {"moe_layers_enum": ",".join(["9"] * 5000)}},
    ],
)
def test_a_hostile_configuration_is_a_finding(tmp_path: pathlib.Path, change: dict[str, dict[str, object]]) -> None:
    write_safetensors(tmp_path / "model.safetensors", [("model.norm.weight", np.zeros(4, np.float32))])
    values = ModelConfig.preset("step3").to_dict()
    for section, changed in change.items():
        values[section] = {**values[section], **changed}  # type: ignore[dict-item]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert inspect_checkpoint(tmp_path).problems


def test_a_deep_configuration_is_a_finding(tmp_path: pathlib.Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", [("model.norm.weight", np.zeros(4, np.float32))])
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "not valid JSON" in inspect_checkpoint(tmp_path).problems["config.json"][0]
