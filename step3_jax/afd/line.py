"""Lines that supervisors exchange: JSON, none longer than a few kilobytes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import TypedDict

from step3_jax.afd.watch import Failure, Report

MAX_LINE_BYTES = 2**14
_MAX_TEXT = 2000
# What a peer that does not read may leave unread.
_MAX_WAITING_BYTES = 2**20


class Message(TypedDict, total=False):
    """One line. `kind` says which of the fields there are.

    To the hub: hello (rank, num_processes, host, token), report (report), failed (failure), ended. From it: welcome
    (host), refused (text), report (report, of rank 0), over (rank, text, is_explained).
    """

    kind: str
    rank: int
    num_processes: int
    host: str
    token: str
    text: str
    is_explained: bool
    report: tuple[str, int, bool, int, float]
    failure: tuple[str, bool, bool, bool]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why all end.

    Attributes:
      rank: Who failed.
      text: What happened, with its name.
      is_explained: Whether its worker has said itself what was wrong.
    """

    rank: int
    text: str
    is_explained: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What the supervisors of a run agree on.

    Attributes:
      rank: The own number.
      roles: Of each rank, such as "ffn 0".
      host: Where rank 0's supervisor is reached.
      port: Its port.
      token: Known to this run alone; empty for none.
      deadline_s: Silence after which somebody is lost.
      start_timeout_s: In which all are to come.
    """

    rank: int
    roles: tuple[str, ...]
    host: str
    port: int
    token: str = ""
    deadline_s: float = 120.0
    start_timeout_s: float = 120.0


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Writes a line, unless the other side has left or does not read."""
    if "text" in message:
        message["text"] = message["text"][:_MAX_TEXT]
    if not writer.is_closing() and writer.transport.get_write_buffer_size() < _MAX_WAITING_BYTES:
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next line; None at the end.

    Raises:
      ValueError: If it is too long, or no message.
    """
    line = await reader.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("no message")
    # Who reads a field checks it.
    return Message(**message)


def pack_verdict(verdict: Verdict) -> Message:
    """As it is told to all."""
    return Message(kind="over", rank=verdict.rank, text=verdict.text, is_explained=verdict.is_explained)


def pack_report(report: Report) -> Message:
    """As it is told every half second."""
    return Message(kind="report", report=(report.where, report.changes, report.is_inside, report.step, report.still_s))


def read_report(message: Message) -> Report:
    """The report of a message.

    Raises:
      ValueError: If it is none.
      TypeError: The same.
      KeyError: The same.
    """
    where, changes, is_inside, step, still_s = message["report"]
    return Report(str(where)[:_MAX_TEXT], int(changes), bool(is_inside), int(step), float(still_s))


def pack_failure(failure: Failure) -> Message:
    """As it is told to the hub."""
    flags = failure.is_explained, failure.is_consequence, failure.is_sudden
    return Message(kind="failed", failure=(failure.text[:_MAX_TEXT], *flags))


def read_failure(message: Message, rank: int) -> Failure:
    """The failure of a message, which the supervisor of `rank` has sent.

    Raises:
      ValueError: If it is none.
      TypeError: The same.
      KeyError: The same.
    """
    text, is_explained, is_consequence, is_sudden = message["failure"]
    return Failure(rank, str(text)[:_MAX_TEXT], bool(is_explained), bool(is_consequence), bool(is_sudden))
