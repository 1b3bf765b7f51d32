"""Files of a checkpoint that are read whole, and what is often found in their place."""

from __future__ import annotations

import json
import os
import pathlib
import re

# Where transformers keeps further chat templates, now and in early versions.
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
# First parts of paths that look like hub names but are not: no user can be called so on the Hugging Face hub.
_NO_HUB_USERS = ("models", "datasets", "spaces")
# How files start that are not what their names say. Longest first where one starts with another.
_STAND_INS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or fetch it with `hf download`",
    ),
    (b"<!doctype html", "an HTML page, such as a login or an error page: download the file again"),
    (b"<html", "an HTML page, such as a login or an error page: download the file again"),
    (b"GGUF", "a GGUF file: this program reads safetensors and Orbax"),
    (b"PK\x03\x04", "a ZIP archive, as PyTorch saves weights: this program reads safetensors and Orbax"),
)
# Enough for every start above with whitespace before it.
START_BYTES = 256


def describe_stand_in(start: bytes) -> str | None:
    """What a file really is if it is not what its name says, and what to do; None if unknown.

    Args:
      start: The file's first `START_BYTES` bytes; all of a shorter one.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        # Zeros are not whitespace: a file of zeros is a hole, and may still be filled.
        return "empty: download the file again"
    return next((what for begin, what in _STAND_INS if text[: len(begin)].lower() == begin.lower()), None)


def read_text(path: pathlib.Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it cannot be read, is empty, is not what its name says, or is not UTF-8; the message
        names it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    what = describe_stand_in(data[:START_BYTES])
    if what is not None:
        raise ValueError(f"{path} is {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; save it as UTF-8: {error}") from None


def read_json_object(path: pathlib.Path) -> dict[str, object]:
    """Reads a JSON object; empty without the file.

    Raises:
      ValueError: As `read_text`, or if the file does not hold a JSON object.
    """
    try:
        stored = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds {type(stored).__name__}; a JSON object is needed")
    return stored


def require_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a checkpoint that a user names.

    Raises:
      ValueError: If there is none; for a name on the Hugging Face hub the message says how to download it.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that holds config.json and the weights")
    advice = download_advice(path) or "; give a local model folder with config.json and the weights"
    raise ValueError(f"there is no folder {path}{advice}")


def download_advice(path: str | os.PathLike[str]) -> str | None:
    """What to do if a missing path may be a name on the Hugging Face hub, as the end of a message."""
    name = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", str(path))
    if name is None or name[1] in _NO_HUB_USERS:
        return None
    return (
        f". If it is a name on the Hugging Face hub: nothing is downloaded here, so run `hf download {path} --local-dir "
        "FOLDER` and give FOLDER"
    )
