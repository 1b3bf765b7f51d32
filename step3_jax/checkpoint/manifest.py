"""The record of an interruptible conversion: what it converts, and which parts are written.

JSON lines. The first says what is converted and how; then there is one line for each written part, with checksums, and now
and then a "synced" line: all parts before it are on the disk itself. A killed process loses nothing that it wrote, so
its parts count without a check; after a power loss the line may be there without the data, so parts after the last
"synced" are checked before they count.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping

from step3_jax.checkpoint.transform import BandError

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One written part.

    Attributes:
      tensor: Name of the source tensor.
      band: Number of the band.
      checksums: CRC-32 of the written bytes, for each tensor written to.
      error: The error of the written values against the source's; None if they are the same.
    """

    tensor: str
    band: int
    checksums: tuple[int, ...]
    error: BandError | None = None


class Manifest:
    """An open record, held by one process at a time.

    Attributes:
      path: The file.
      records: All parts written so far, by tensor and band.
      unsynced: Those not yet covered by a "synced" line.
      is_laid_out: Whether the files that parts are written to have been created.
    """

    def __init__(self, path: pathlib.Path, about: Mapping[str, object]) -> None:
        """Opens the record, or starts a new one.

        Args:
          path: The file; it is created if it does not exist, or if a kill left it without even its first line.
          about: What is converted and how, as JSON values; an existing record must be about the same.

        Raises:
          ValueError: If the record is about something else (the message says what differs), is damaged, or another
            process has it.
        """
        self.path = path
        self.records: dict[tuple[str, int], Record] = {}
        self.unsynced: dict[tuple[str, int], Record] = {}
        self.is_laid_out = False
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._descriptor, path)
            lines = self._read_lines()
            if lines:
                self._check(lines[0], json.loads(json.dumps(dict(about))))
                for line in lines[1:]:
                    self._apply(line)
            else:
                self._write({"version": VERSION, **about})
                os.fsync(self._descriptor)
        except BaseException:
            self.close()
            raise

    def add(self, record: Record) -> None:
        """Records a part."""
        line: dict[str, object] = {"tensor": record.tensor, "band": record.band, "checksums": record.checksums}
        if record.error is not None:
            line["error"] = dataclasses.astuple(record.error)
        self._write(line)
        self.records[record.tensor, record.band] = self.unsynced[record.tensor, record.band] = record

    def forget(self, record: Record) -> None:
        """Discards a part that does not count after all; it is written again, and its newer line then counts."""
        self.records.pop((record.tensor, record.band), None)
        self.unsynced.pop((record.tensor, record.band), None)

    def mark_laid_out(self) -> None:
        """Records that the files to write to exist."""
        self._write({"laid_out": True})
        os.fsync(self._descriptor)
        self.is_laid_out = True

    def mark_synced(self) -> None:
        """Records that all parts so far are on the disk itself, as the caller has ensured."""
        self._write({"synced": True})
        os.fsync(self._descriptor)
        self.unsynced.clear()

    def close(self) -> None:
        """Closes the file and releases its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_lines(self) -> list[dict[str, object]]:
        """The complete lines; a last one that a kill cut off is removed."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        lines = []
        for number, text in enumerate(data[:end].splitlines(), start=1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict):
                raise ValueError(f"{self.path} is damaged at line {number}; remove {self.path.parent} to start over")
            lines.append(line)
        return lines

    def _check(self, first: Mapping[str, object], about: Mapping[str, object]) -> None:
        folder = self.path.parent
        if first.get("version") != VERSION:
            raise ValueError(f"{folder} was started by another version of this tool; remove it to start over")
        for title in about:
            was, now = first.get(title), about[title]
            if was == now:
                continue
            if not isinstance(was, dict) or not isinstance(now, dict):
                raise ValueError(f"{folder} was started with {title} {was}, now it is {now}; remove it to start over")
            keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
            shown = ", ".join(f"{key} (was {was.get(key)}, is {now.get(key)})" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{folder} was started with another {title}: {shown}{more}; give the same, or remove it to start over"
            )

    def _apply(self, line: dict[str, object]) -> None:
        if line.get("synced"):
            self.unsynced.clear()
        elif line.get("laid_out"):
            self.is_laid_out = True
        else:
            try:
                record = _parse(line)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{self.path} is damaged; remove {self.path.parent} to start over") from None
            self.records[record.tensor, record.band] = self.unsynced[record.tensor, record.band] = record

    def _write(self, line: Mapping[str, object]) -> None:
        data = (json.dumps(line) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # Half a line in the middle would corrupt the file.
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def check_free(path: pathlib.Path) -> None:
    """Refuses a record that another process is writing; a missing one is free.

    Raises:
      ValueError: If another process has it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path.parent} is being written by another process; wait for it or stop it") from None


def _parse(line: Mapping[str, object]) -> Record:
    error = line.get("error")
    return Record(
        str(line["tensor"]),
        int(line["band"]),  # type: ignore[call-overload]
        tuple(int(value) for value in line["checksums"]),  # type: ignore[attr-defined]
        BandError(*(float(value) for value in error)) if isinstance(error, list) else None,
    )
