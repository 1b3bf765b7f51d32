"""Messages as frames: the same data on the other side, nothing twice, and nothing that is not a message."""

from __future__ import annotations

import ml_dtypes
import msgpack
import numpy as np
import pytest

from step3_jax.channel.message import Decoder, Encoder, Message, MessageError


def carry(message: Message, encoder: Encoder, decoder: Decoder) -> tuple[Message, int]:
    """A message on the other side, and its bytes."""
    frames = [bytes(frame) for frame in encoder.encode(message)]
    return decoder.decode(frames), sum(map(len, frames))


def test_fields_arrive_as_they_were() -> None:
    arrays = {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "large": np.arange(5000, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "narrow": np.array([1.5, -2], ml_dtypes.bfloat16),
        "words": np.array([[2**32 - 1, 0]], np.uint32),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.int32),
        "number": np.array(7, np.int32),
        "columns": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    plain = {"none": None, "yes": True, "count": 3, "share": 0.5, "text": "é", "pages": [1, 2]}
    found, _ = carry(Message("decode", arrays | plain), Encoder(), Decoder())
    assert found.kind == "decode"
    assert {name: found.fields[name] for name in plain} == plain
    for name, array in arrays.items():
        got = found.fields[name]
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)


def test_an_array_that_is_the_same_is_not_sent_again() -> None:
    encoder, decoder = Encoder(), Decoder()
    kept, other = np.zeros((1000,), np.int32), np.ones((3,), np.int32)
    first, _ = carry(Message("decode", {"kept": kept}, keeps=True), encoder, decoder)
    again, num_bytes = carry(Message("decode", {"kept": kept, "other": other}, keeps=True), encoder, decoder)
    assert num_bytes < 200
    # The same object, so that what was placed on a device for it need not be placed again.
    assert again.fields["kept"] is first.fields["kept"]
    equal, _ = carry(Message("decode", {"kept": kept.copy()}, keeps=True), encoder, decoder)
    assert equal.fields["kept"] is not first.fields["kept"]


def test_an_array_that_is_not_kept_is_sent_each_time() -> None:
    encoder, decoder = Encoder(), Decoder()
    pixels = np.zeros((1000,), np.float32)
    sizes = [carry(Message("encode", {"pixels": pixels}), encoder, decoder)[1] for _ in range(2)]
    assert sizes[0] == sizes[1] > pixels.nbytes
    assert not encoder._known
    assert not decoder._known


def test_an_object_is_no_array() -> None:
    with pytest.raises(ValueError, match="dtype object, which is not supported"):
        Encoder().encode(Message("decode", {"one": np.array([{}], object)}))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"\xc1"],
        [msgpack.packb(["decode", {}, False]), b"more"],
        [msgpack.packb(["decode"])],
        [msgpack.packb([1, {}, False])],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(1, msgpack.packb(["float32", [2]]))}, False]), b"1234"],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(1, msgpack.packb(["float32", [-1, -1]]))}, False]), b"1234"],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(1, msgpack.packb(["object", [1]]))}, False]), b"12345678"],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(1, b"\xc1")}, False]), b"1234"],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(2, b"")}, False])],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(9, b"")}, False])],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(3, msgpack.packb(["int32", [1]]))}, False])],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(3, msgpack.packb(["int32", [2], b"1234"]))}, False])],
        [msgpack.packb(["decode", {"a": msgpack.ExtType(3, msgpack.packb(["int32", [1], 5]))}, False])],
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MessageError):
        Decoder().decode(frames)
