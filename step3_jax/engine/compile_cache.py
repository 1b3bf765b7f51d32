"""The compile cache on disk, so that a program is compiled once for all runs."""

from __future__ import annotations

import os
import pathlib
import tempfile

import jax


def enable_compile_cache(folder: str | pathlib.Path | None = None) -> pathlib.Path | None:
    """Keeps compiled programs on disk; for commands, before their first computation.

    Args:
      folder: Where. By default `$JAX_COMPILATION_CACHE_DIR`, else `step3-jax/xla` in `$XDG_CACHE_HOME` or `~/.cache`.

    Returns:
      The folder, or None where none can be written: then programs are compiled at every run, and nothing else changes.
    """
    path = pathlib.Path(folder) if folder is not None else _default_folder()
    if path is None or not _is_writable(path):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small and quick programs too: together they are most of the start of a small model.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path


def _default_folder() -> pathlib.Path | None:
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named:
        return pathlib.Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = pathlib.Path(base) if base else pathlib.Path.home() / ".cache"
    except RuntimeError:  # A user without a home.
        return None
    return cache / "step3-jax" / "xla"


def _is_writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
