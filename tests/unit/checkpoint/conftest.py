"""A way to make damaged files: the pieces of a safetensors file, put together by hand."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def write_raw(tmp_path):
    """Writes header and data as given, however wrong they are."""

    def write(header, data=b"", *, name="model.safetensors", length=None):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(encoded) if length is None else length
        path = tmp_path / name
        path.write_bytes(size.to_bytes(8, "little") + encoded + data)
        return path

    return write
