"""Small JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path


def read_json_object(path: Path) -> dict[str, object]:
    """Reads a JSON object; empty without the file. Raises ValueError if the file holds something else."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(stored).__name__}.")
    return stored
