"""The planner's YAML files, read value by value: messages name file and key."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Collection, Mapping

import yaml

from step3_jax.nearest import describe_known


def read_yaml(path: pathlib.Path) -> Mapping[str, object]:
    """The mapping in a YAML file.

    Raises:
      ValueError: If the file is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; a mapping is needed")
    return values


class Reader:
    """A mapping from a file, whose values are read by kind.

    Attributes:
      where: File and place in it, for messages.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        """Starts with no key read."""
        self._values = values
        self._asked: set[str] = set()
        self.where = where

    @property
    def keys(self) -> list[str]:
        """Names of all values, in the file's order."""
        return [str(key) for key in self._values]

    def has(self, key: str) -> bool:
        """Whether a key is present with a value."""
        self._asked.add(key)
        return self._values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A text; `default` if it is missing."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """One of a few texts."""
        value = self.text(key)
        if value not in allowed:
            raise ValueError(f"{self.where}: {key} is {value!r}{describe_known(value, allowed)}")
        return value

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self._get(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number of at least 1")
        return value

    def count(self, key: str) -> int:
        """A whole number; 0 if it is missing."""
        value = self._get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, "a whole number, 0 or more,")
        return value

    def number(self, key: str) -> float:
        """A number above 0."""
        value = self._get(key, None)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """A list of at least one text."""
        return [one for one in self._list(key, str, "a list of texts") if isinstance(one, str)]

    def counts(self, key: str) -> list[int]:
        """A list of at least one whole number."""
        return [one for one in self._list(key, int, "a list of whole numbers") if isinstance(one, int)]

    def numbers(self, key: str) -> list[float]:
        """A list of at least one number."""
        return [float(one) for one in self._list(key, int | float, "a list of numbers") if isinstance(one, int | float)]

    def section(self, key: str) -> Reader:
        """A nested mapping."""
        value = self._get(key, None)
        if not isinstance(value, Mapping):
            raise self._wrong(key, "a mapping")
        return Reader(value, f"{self.where}: {key}")

    def sections(self, key: str) -> list[Reader]:
        """A list of at least one mapping."""
        values = self._list(key, Mapping, "a list of mappings")
        return [
            Reader(one, f"{self.where}: {key}[{number}]")
            for number, one in enumerate(values)
            if isinstance(one, Mapping)
        ]

    def check_all_read(self) -> None:
        """Raises ValueError for a key that was not read."""
        for key in self._values:
            if key not in self._asked:
                raise ValueError(f"{self.where}: unknown key {key}{describe_known(str(key), sorted(self._asked))}")

    def _list(self, key: str, kind: type | types.UnionType, wanted: str) -> list[object]:
        value = self._get(key, None)
        if not isinstance(value, list) or not value or not all(isinstance(one, kind) for one in value):
            raise self._wrong(key, wanted)
        return value

    def _get(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def _wrong(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {key} is {self._values.get(key)!r}; {wanted} is needed")
