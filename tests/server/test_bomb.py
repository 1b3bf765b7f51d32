"""Requests of a few kilobytes that would take gigabytes, or for ever: they are answered, and the memory stays flat."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator

import pytest

from tests.process import measure_peak_kib
from tests.server.client import Client, ask
from tests.server.conftest import Open

# What a few requests take anyway; each of the images alone would be larger.
MOST_KIB = 128 * 1024
NUM_ROUNDS = 3


@pytest.fixture(scope="module")
def willing(open_client: Open) -> Iterator[Client]:
    """With a model that writes what it may, where its reply is not allowed."""
    with open_client(engine={"max_model_len": 256}) as client:
        client.executor.is_stubborn = False
        yield client


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A file with a header, whatever comes after it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def grey(width: int, height: int) -> bytes:
    """All pixels of a black image, packed."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(width + 1)) for _ in range(height)), packer.flush()])


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def check(client: Client, bodies: list[dict[str, object]], statuses: set[int]) -> None:
    """All are answered, with less memory than one of them would take."""

    def call_all() -> None:
        for body in bodies * NUM_ROUNDS:
            reply = client.call("/v1/chat/completions", body)
            assert reply.status in statuses, (str(body)[:200], reply.body[:500])

    client.chat(max_tokens=4)
    assert measure_peak_kib(call_all) < MOST_KIB
    assert client.call("/health").status == 200
    assert client.service.admission.num_requests == 0
    assert not client.service.llm.core.has_work


def test_images_that_promise_more_than_is_allowed_are_not_unpacked(willing: Client) -> None:
    files = [
        png(50_000, 50_000),
        png(2**31 - 1, 2**31 - 1),
        gif(65_535, 65_535),
        png(14_000, 14_000, grey(14_000, 14_000)),
    ]
    bodies = []
    for file in files:
        url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}] * 4
        bodies.append({"messages": [{"role": "user", "content": parts}]})
    check(willing, bodies, {400})


def test_images_that_are_cut_off_are_an_error_of_the_request(willing: Client) -> None:
    file = png(6_000, 6_000, grey(6_000, 6_000)[:200])
    url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    check(willing, [{"messages": [{"role": "user", "content": [part]}]}], {400})


def test_schemas_that_would_grow_beyond_bounds_end(willing: Client) -> None:
    word = {"type": "string"}
    laughs = {
        f"d{level}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{level + 1}"}] * 8} for level in range(8)
    }
    schemas: list[object] = [
        {"type": "string", "pattern": "((((a{1,50}){1,50}){1,50}){1,50})"},
        {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9},
        {"type": "array", "items": word, "minItems": 10**6},
        {"enum": [f"{number:06}" for number in range(15_000)]},
        {"type": "object", "properties": {f"p{number}": word for number in range(300)}},
        {"allOf": [{"anyOf": [word, {"type": "integer"}]}] * 500},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": laughs | {"d8": word}, "$ref": "#/$defs/d0"},
        {"anyOf": [{"const": "x" * 100}] * 20_000},
    ]
    bodies = [
        ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, max_tokens=4)
        for schema in schemas
    ]
    bodies += [ask(structured_outputs={"regex": "(a?){200}" * 20}, max_tokens=4)]
    # On a busy machine a grammar may be late, or find others that are.
    check(willing, bodies, {200, 400, 503})
