"""The two files of a batch, in OpenAI's format: requests in, answers out, safe against a kill at any moment."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
import uuid

try:
    import fcntl
except ImportError:  # Not on every system; there, the user must not give two processes the same output.
    fcntl = None  # type: ignore[assignment]

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_FORM = '{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """Where a request is in its file: bodies with images are large, so they are read again when it is their turn.

    Attributes:
      custom_id: The user's name for it.
      url: The endpoint; one of `URLS`.
      offset: Offset of its first byte.
      length: Length in bytes.
    """

    custom_id: str
    url: str
    offset: int
    length: int


class BatchInput:
    """The requests of a file; all of them are checked first, so that a mistake in the last line does not cost an hour.

    Attributes:
      lines: All requests, in order.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the file once.

        Args:
          path: A JSON object on each line; empty lines are skipped.

        Raises:
          ValueError: If it cannot be read, has no requests, or a line is malformed; the message gives its number.
        """
        self._path = path
        self.lines: list[BatchLine] = []
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            self._find_lines()
        except BaseException:
            self._file.close()
            raise

    def read_body(self, line: BatchLine) -> bytes:
        """The body of a request as JSON."""
        data = os.pread(self._file.fileno(), line.length, line.offset)
        return json.dumps(json.loads(data)["body"]).encode()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _find_lines(self) -> None:
        numbers: dict[str, int] = {}
        offset = 0
        for number, data in enumerate(self._file, start=1):
            where = f"{self._path}, line {number}"
            if data.strip():
                custom_id, url = _check_line(data, where)
                if custom_id in numbers:
                    raise ValueError(f"{where}: custom_id {custom_id!r} is also on line {numbers[custom_id]}")
                numbers[custom_id] = number
                self.lines.append(BatchLine(custom_id, url, offset, len(data)))
            offset += len(data)
        if not self.lines:
            raise ValueError(f"{self._path} has no requests; on each line {_FORM} is needed")


class BatchOutput:
    """A file that answers are appended to, each as a complete line that is on the disk before the next ones are written.

    A partial line at its end, left by a kill, is removed when the file is opened again.

    Attributes:
      done: The `custom_id` of every request that is answered.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Opens the file exclusively for this process, or creates it.

        Raises:
          ValueError: If it cannot be written, another process writes to it, or it holds anything but answers.
        """
        self._path = path
        self.done: set[str] = set()
        self._waiting: list[bytes] = []
        self._is_writing = False
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
        try:
            self._find_done()
        except BaseException:
            self._file.close()
            raise

    async def add(self, custom_id: str, status: int, request_id: str, body: bytes) -> None:
        """Appends an answer. Answers that arrive while others are written go to the disk together.

        Args:
          custom_id: The request's.
          status: The HTTP status; an error is an answer too.
          request_id: The service's name for it.
          body: The answer, as JSON.
        """
        entry = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": json.loads(body)},
            "error": None,
        }
        self._waiting.append(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self.done.add(custom_id)
        if self._is_writing:
            return
        self._is_writing = True
        try:
            while self._waiting:
                data, self._waiting = b"".join(self._waiting), []
                await asyncio.to_thread(self._write, data)
        finally:
            self._is_writing = False

    def close(self) -> None:
        """Writes the rest, and closes the file."""
        if self._waiting:
            self._write(b"".join(self._waiting))
        self._file.close()

    def _find_done(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process writes to {self._path}: wait for it, or give another file") from None
            except OSError:
                pass  # Some file systems have no locks.
        end = 0
        self._file.seek(0)
        for number, data in enumerate(self._file, start=1):
            if not data.endswith(b"\n"):
                break
            self.done.add(_read_custom_id(data, f"{self._path}, line {number}"))
            end += len(data)
        self._file.truncate(end)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _check_line(data: bytes, where: str) -> tuple[str, str]:
    """`custom_id` and URL of a request."""
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}; {_FORM} is needed") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {type(entry).__name__}; {_FORM} is needed")
    custom_id, body = entry.get("custom_id"), entry.get("body")
    if not isinstance(custom_id, str) or not custom_id or not custom_id.isprintable():
        raise ValueError(f"{where} has custom_id {custom_id!r}; a text of one line is needed, unique for each request")
    if entry.get("method", "POST") != "POST":
        raise ValueError(f"{where} has method {entry['method']!r}; POST is needed")
    if entry.get("url") not in URLS:
        raise ValueError(f"{where} has url {entry.get('url')!r}; one of {', '.join(URLS)} is needed")
    if not isinstance(body, dict):
        raise ValueError(f"{where} has a body that is {type(body).__name__}; an object is needed")
    if body.get("stream"):
        raise ValueError(f"{where} asks for a stream; a batch returns whole answers: leave `stream` out")
    return custom_id, entry["url"]


def _read_custom_id(data: bytes, where: str) -> str:
    try:
        entry = json.loads(data)
        found = entry["custom_id"]
        if isinstance(found, str) and "response" in entry:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{where} is not an answer of a batch, so nothing is appended to the file: give another one")
