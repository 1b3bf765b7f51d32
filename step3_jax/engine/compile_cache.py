"""The on-disk compile cache, so that a program is compiled once for all runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import tempfile
import time
import zlib

import jax

from step3_jax import resources

_LOG = logging.getLogger(__name__)

# JAX's own variables; both are read by JAX when it is imported.
FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Entries that were found intact, so that each is checked once.
CHECKED = "step3-checked.json"
_ENTRIES = "*-cache"
# Checking may take this long at start-up; the rest is checked at the next one.
_MAX_CHECK_S = 2.0
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PIECE_BYTES = 2**20


def enable_compile_cache(folder: str | pathlib.Path | None = None) -> str | None:
    """Keeps compiled programs on disk; call it before the first computation. Damaged entries are removed and recompiled.

    Does nothing if the program has set its own folder with `jax.config`, or JAX_ENABLE_COMPILATION_CACHE is 0.

    Args:
      folder: Where to keep them. By default `$JAX_COMPILATION_CACHE_DIR`, else `step3-jax/xla` in `$XDG_CACHE_HOME` or
        `~/.cache`. An address such as gs://bucket/xla is passed to JAX unchanged.

    Returns:
      The folder or address, or None without a cache: then programs are compiled in every run, and nothing else
      changes.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    current, named = jax.config.values["jax_compilation_cache_dir"], os.environ.get(FOLDER_VARIABLE) or None
    default = resources.find_cache("xla")
    if folder is None and current is not None and current not in (named, str(default)):
        return str(current)
    wanted = folder or named or default
    if wanted is None:
        return None
    where = str(wanted)
    if "://" not in where:
        path = pathlib.Path(where).expanduser()
        if not _is_writable(path):
            return None
        remove_damaged(path)
        where = str(path)
    jax.config.update("jax_compilation_cache_dir", where)
    # Small and quick programs too: together they are most of the start of a small model.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _LOG.info("compiled programs are kept in %s", where)
    return where


def remove_damaged(folder: pathlib.Path) -> list[str]:
    """Removes entries that cannot be unpacked, which JAX would warn about at every start and never replace.

    Args:
      folder: The cache.

    Returns:
      Names of the removed entries.
    """
    checked = _read_checked(folder)
    found: dict[str, list[int]] = {}
    removed: list[str] = []
    give_up_at = time.monotonic() + _MAX_CHECK_S
    for path, stamp in _list_entries(folder):
        if checked.get(path.name) == stamp:
            found[path.name] = stamp
        elif time.monotonic() < give_up_at:
            if _is_whole(path):
                found[path.name] = stamp
            else:
                # Another process may have been faster, or the file may belong to another user.
                with contextlib.suppress(OSError):
                    path.unlink()
                removed.append(path.name)
                _LOG.warning("%s was damaged: removed it; its program is compiled again", path)
    if found != checked:
        _write_checked(folder, found)
    return removed


def _is_writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _list_entries(folder: pathlib.Path) -> list[tuple[pathlib.Path, list[int]]]:
    """Entries with their size and modification time, the newest first."""
    found = []
    for path in folder.glob(_ENTRIES):
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((path, [stat.st_size, stat.st_mtime_ns]))
    return sorted(found, key=lambda entry: entry[1][1], reverse=True)


def _is_whole(path: pathlib.Path) -> bool:
    """Whether an entry can be unpacked. If that cannot be told (zstd, another user's file) it counts as intact."""
    try:
        with path.open("rb") as file:
            data = file.read(_PIECE_BYTES)
            if data.startswith(_ZSTD_MAGIC):
                return True
            unpacker = zlib.decompressobj()
            while data:
                unpacker.decompress(data)
                data = file.read(_PIECE_BYTES)
            return unpacker.eof
    except zlib.error:
        return False
    except OSError:
        return True


def _read_checked(folder: pathlib.Path) -> dict[str, list[int]]:
    try:
        found = json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_checked(folder: pathlib.Path, found: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):
        new = folder / f"{CHECKED}.{os.getpid()}"
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(folder / CHECKED)
