"""Files that ship with the package (the tiny model, the configurations), and the folder for files that it creates."""

from __future__ import annotations

import os
import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parent


def find_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder at `path`, or else the shipped one of that name: `models/step3-tiny` works everywhere.

    Returns:
      `path` itself if there is neither: the caller reports what is wrong with it.
    """
    folder = pathlib.Path(path)
    if folder.exists() or folder.parts[:1] != ("models",):
        return folder
    try:
        return find(str(path))
    except ValueError:
        return folder


def find(name: str) -> pathlib.Path:
    """The path of a shipped file or folder, such as `models/step3-tiny` or `configs/models/step3.json`.

    An installed wheel has them inside the package; a source checkout has them next to it.

    Raises:
      ValueError: If there is no such file.
    """
    if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
        raise ValueError(f"{name!r} is not the name of a shipped file: give a path such as models/step3-tiny")
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise ValueError(f"{name} is not among the files shipped with step3_jax")


def find_cache(name: str) -> pathlib.Path | None:
    """Folder `name` for cached files: in `step3-jax` in `$XDG_CACHE_HOME` or `~/.cache`.

    It need not exist. None for a user without a home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = pathlib.Path(base) if base else pathlib.Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "step3-jax" / name
