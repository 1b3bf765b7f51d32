"""Fuzzes the reader of safetensors headers and of the index, guided by coverage.

    pip install atheris                                        # in a separate environment, next to step3-jax
    python -m tools.fuzz_safetensors -max_total_time=600       # options are libFuzzer's

An input's first byte chooses what is made of the rest: a file verbatim, a header with valid length and data, a header
built value by value, or an index over two valid shards. A finding is anything but a ValueError that names the file: a
crash, a read outside the file, tensors that overlap, a file from outside the folder, an unbounded message.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import atheris
import numpy as np

with atheris.instrument_imports(include=["step3_jax.checkpoint", "json"]):
    from step3_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFile, write_safetensors
    from step3_jax.checkpoint.shards import INDEX_FILE, Checkpoint, write_checkpoint

MAX_MESSAGE = 20_000
NUMBERS = (0, 1, 2, 4, 7, 8, 2**31, 2**32, 2**59, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -1)
NAMES = ("a", "b", "__metadata__", "", "dtype", "shape", "data_offsets", "\ud800", "\x1b[2J", "x" * 1001)
SHARDS = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "../secret.safetensors",
    "link.safetensors",
    "loop.safetensors",
    "folder.safetensors",
    "/etc/passwd",
    "..",
    "",
)


class Folder:
    """The files that inputs are written to, and one that they must never reach."""

    def __init__(self, root: pathlib.Path) -> None:
        self.file = root / "x.safetensors"
        self.model = root / "model"
        self.model.mkdir()
        self.values = np.arange(4, dtype=np.float32)
        write_checkpoint(self.model, [(name, self.values) for name in "abc"], max_shard_bytes=32)
        write_safetensors(root / "secret.safetensors", [("secret", self.values)])
        (self.model / "link.safetensors").symlink_to(root / "secret.safetensors")
        (self.model / "loop.safetensors").symlink_to(self.model / "loop.safetensors")
        (self.model / "folder.safetensors").mkdir()

    def try_file(self, content: bytes) -> None:
        """Opens `content` as a file and reads every tensor of it."""
        self.file.write_bytes(content)
        try:
            file = SafetensorsFile(self.file)
        except ValueError as error:
            _check_message(error, self.file)
            return
        with file:
            end = 8 + int.from_bytes(content[:8], "little")
            for name, info in file.tensors.items():
                if info.start != end or info.stop > len(content):
                    raise RuntimeError(f"{name} lies at {info.start}..{info.stop}, the file has {len(content)}")
                end = info.stop
                if np.array(file.read(name)).tobytes() != content[info.start : info.stop]:
                    raise RuntimeError(f"{name} is not what the file holds")
            if end != len(content):
                raise RuntimeError(f"{len(content) - end} bytes belong to no tensor")

    def try_index(self, content: bytes) -> None:
        """Opens the two shards with `content` as their index."""
        (self.model / INDEX_FILE).write_bytes(content)
        try:
            checkpoint = Checkpoint(self.model)
        except ValueError as error:
            _check_message(error, self.model)
            return
        with checkpoint:
            if not checkpoint.tensors.keys() <= set("abc"):
                raise RuntimeError(f"tensors from outside the folder: {sorted(checkpoint.tensors)}")
            for name in checkpoint.tensors:
                np.testing.assert_array_equal(checkpoint.read(name), self.values)


def _check_message(error: ValueError, path: pathlib.Path) -> None:
    message = str(error)
    if str(path) not in message or len(message) > MAX_MESSAGE or not message.isprintable():
        raise RuntimeError(f"a useless message: {message[:500]!r}") from error


def _with_length(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _any_value(data: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    kind = data.ConsumeIntInRange(0, 9 if depth < 6 else 6)
    if kind < 3:
        return data.PickValueInList(list(NUMBERS)) if kind else data.ConsumeIntInRange(0, 64)
    if kind < 7:
        return (None, True, data.ConsumeRegularFloat(), data.ConsumeUnicode(4))[kind - 3]
    count = data.ConsumeIntInRange(0, 3)
    if kind == 7:
        return {_any_name(data): _any_value(data, depth + 1) for _ in range(count)}
    return [_any_value(data, depth + 1) for _ in range(count)]


def _any_name(data: atheris.FuzzedDataProvider) -> str:
    return data.PickValueInList(list(NAMES)) if data.ConsumeBool() else data.ConsumeUnicode(4)


def _built_header(data: atheris.FuzzedDataProvider) -> bytes:
    """A header whose entries are valid except where the input says otherwise, and data to go with it."""
    header: dict[str, object] = {}
    position = 0
    for _ in range(data.ConsumeIntInRange(0, 4)):
        dtype = data.PickValueInList(list(DTYPES))
        shape = [data.ConsumeIntInRange(0, 3) for _ in range(data.ConsumeIntInRange(0, 3))]
        stop = position + int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        entry: dict[str, object] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        if data.ConsumeIntInRange(0, 3) == 0:
            entry[data.PickValueInList(["dtype", "shape", "data_offsets"])] = _any_value(data)
        header[_any_name(data)] = entry
        position = stop
    size = min(max(0, position + data.ConsumeIntInRange(-8, 8)), 4096) if data.ConsumeBool() else position
    return _with_length(json.dumps(header).encode(), bytes(index % 251 for index in range(size)))


def _built_index(data: atheris.FuzzedDataProvider) -> bytes:
    weight_map: dict[str, object] = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    for _ in range(data.ConsumeIntInRange(0, 3)):
        name = data.PickValueInList(["a", "b", "c", "d"]) if data.ConsumeBool() else _any_name(data)
        weight_map[name] = data.PickValueInList(list(SHARDS)) if data.ConsumeBool() else _any_value(data)
    return json.dumps({"weight_map": weight_map}).encode()


def main() -> None:
    """Runs until a finding, or for as long as libFuzzer's options say."""
    with tempfile.TemporaryDirectory(prefix="fuzz-safetensors-") as root:
        folder = Folder(pathlib.Path(root))

        def try_input(content: bytes) -> None:
            kind, rest = (content[0] % 5, content[1:]) if content else (0, b"")
            if kind == 0:
                folder.try_file(rest)
            elif kind == 1:
                folder.try_file(_with_length(rest, bytes(8)))
            elif kind == 2:
                folder.try_file(_built_header(atheris.FuzzedDataProvider(rest)))
            elif kind == 3:
                folder.try_index(rest)
            else:
                folder.try_index(_built_index(atheris.FuzzedDataProvider(rest)))

        atheris.Setup(sys.argv, try_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
