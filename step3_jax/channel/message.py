"""Messages as frames: a MessagePack header with small arrays in it, followed by the bytes of each large array.

If a message says so, an array that is the same object as the last one of its name is not sent again. Nothing that is
received is executed, and no size is trusted: anything that does not fit is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np

Value = None | bool | int | float | str | list[int] | np.ndarray
Fields = Mapping[str, Value]
# MessagePack extension types: an array that follows, one that the receiver has, and one with its bytes.
_ARRAY, _SAME, _SMALL = 1, 2, 3
# Copying this many bytes costs less than a separate frame, for each receiver.
_SMALL_BYTES = 4096
_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (np.bool_, np.int8, np.uint8, np.int32, np.uint32, np.int64, np.float32, np.float16, ml_dtypes.bfloat16)
}
_MAX_HEAD_BYTES = 2**20


class MessageError(ValueError):
    """Frames that are not a message."""


class Message(NamedTuple):
    """A message.

    Attributes:
      kind: Its kind.
      fields: Its contents.
      keeps: Whether both ends keep its arrays, so that those that are the same in the next one of its kind need not
        be sent again.
    """

    kind: str
    fields: Fields
    keeps: bool = False


class Encoder:
    """Encodes messages as frames, all of which go to the same receivers in order."""

    def __init__(self) -> None:
        """Starts like a `Decoder`: no array is known."""
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def encode(self, message: Message) -> list[bytes | memoryview]:
        """The frames of a message. Its arrays must not be changed afterwards.

        Raises:
          ValueError: If an array has an unsupported dtype.
        """
        frames: list[bytes | memoryview] = [b""]
        head: dict[str, object] = {}
        for name, value in message.fields.items():
            if not isinstance(value, np.ndarray):
                head[name] = value
                continue
            key = message.kind, name
            if self._known.get(key) is value:
                head[name] = msgpack.ExtType(_SAME, b"")
                continue
            if value.dtype.name not in _DTYPES:
                raise ValueError(f"{name} has dtype {value.dtype}, which is not supported")
            if message.keeps:
                self._known[key] = value
            form: list[object] = [value.dtype.name, list(value.shape)]
            if value.nbytes <= _SMALL_BYTES:
                head[name] = msgpack.ExtType(_SMALL, msgpack.packb([*form, value.tobytes()]))
                continue
            head[name] = msgpack.ExtType(_ARRAY, msgpack.packb(form))
            # Through bytes, as buffers of bfloat16 have no format.
            frames.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        frames[0] = msgpack.packb([message.kind, head, message.keeps])
        return frames


class Decoder:
    """Reads one `Encoder`'s messages, in order."""

    def __init__(self) -> None:
        """Starts like an `Encoder`."""
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def decode(self, frames: Sequence[bytes | memoryview]) -> Message:
        """The message. Its arrays are views of the frames; one that was not sent again is the same object as before.

        Raises:
          MessageError: If the frames are not a message.
        """
        try:
            kind, head, keeps = msgpack.unpackb(frames[0], ext_hook=msgpack.ExtType, max_ext_len=_MAX_HEAD_BYTES)
        except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
            raise MessageError(f"not a message: {error}") from None
        if not isinstance(kind, str) or not isinstance(head, dict):
            raise MessageError("not a message: no kind")
        left = list(frames[1:])
        fields: dict[str, Value] = {}
        for name, value in head.items():
            if not isinstance(value, msgpack.ExtType):
                fields[name] = value
                continue
            key = kind, name
            if value.code == _SMALL or (value.code == _ARRAY and left):
                array = _read_array(value.data, left.pop(0) if value.code == _ARRAY else None)
            elif value.code == _SAME and key in self._known:
                array = self._known[key]
            else:
                raise MessageError(f"{kind}: {name} has no array")
            if keeps:
                self._known[key] = array
            fields[name] = array
        if left:
            raise MessageError(f"{kind}: {len(left)} frames too many")
        return Message(kind, fields, bool(keeps))


def _read_array(form: bytes, frame: bytes | memoryview | None) -> np.ndarray:
    """An array whose bytes are a frame, or the last part of its header."""
    try:
        name, shape, *rest = msgpack.unpackb(form)
        if frame is None:
            [frame] = rest
        dtype = _DTYPES[name]
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise MessageError("a shape is not a list of sizes")
        if math.prod(shape) * dtype.itemsize != memoryview(frame).nbytes:
            raise MessageError(f"{memoryview(frame).nbytes} bytes are not {name} of shape {shape}")
        return np.frombuffer(frame, np.uint8).view(dtype).reshape(shape)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise MessageError(f"not an array: {error}") from None
