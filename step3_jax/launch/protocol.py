"""The lines that the launcher and the keeper of a host exchange: JSON behind a mark.

What a login shell prints on its way (a message of the day) has no mark, and is passed on as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TypedDict

_MARK = b"\x1estep3 "


class Start(TypedDict):
    """A process to start. `environment` is laid over that of the host."""

    rank: int
    module: str
    words: list[str]
    environment: dict[str, str]


class Message(TypedDict, total=False):
    """One line. `kind` says which of the fields there are.

    To the keeper: listen (port, host), reach (host, port, seconds), release, start (processes), end (signal, seconds),
    beat, leave. From it: hello (host, address, gpus, versions), listening (port), reached (text: what is wrong, or
    empty), output (rank, stream, data), ended (rank, code), failed (text), beat. The launcher's own side adds noise
    (text, which came without a mark) and closed (code).
    """

    kind: str
    rank: int
    code: int
    port: int
    host: str
    address: str
    seconds: float
    signal: int
    stream: str
    data: str
    text: str
    gpus: list[str]
    versions: dict[str, str]
    processes: list[Start]


def encode(message: Message) -> bytes:
    """One message as a line."""
    return _MARK + json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Reads a line; one that holds no message is noise."""
    _, mark, text = line.partition(_MARK)
    if mark:
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if isinstance(message, Mapping) and "kind" in message:
            return Message(**message)
    return Message(kind="noise", text=line.decode(errors="replace").rstrip("\r\n"))


def pack_output(rank: int, stream: str, data: bytes) -> Message:
    """Bytes that a process wrote; `stream` is "stdout" or "stderr"."""
    return Message(kind="output", rank=rank, stream=stream, data=base64.b85encode(data).decode())


def unpack_output(message: Message) -> bytes:
    """The bytes of an output."""
    return base64.b85decode(message["data"])
