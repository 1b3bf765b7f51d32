"""Numbers with units, as in users' input."""

from __future__ import annotations

import re

from step3_jax.nearest import describe_known

# A context of 8K means 8,192 tokens, in the report and here.
TOKEN_UNITS = {"k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_tokens(text: str, name: str = "--context") -> int:
    """Reads a number of tokens: "16384" literally, "8k" as 8,192.

    Args:
      text: The given text.
      name: The option's name, for messages.

    Raises:
      ValueError: If it is not a whole number of at least 1, or the unit is unknown.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{name} {text}: give a number of tokens, such as 16384 or 16k")
    digits, unit = match[1].replace(",", "").replace("_", ""), match[2].lower()
    if unit and unit not in TOKEN_UNITS:
        raise ValueError(f"{name} {text}: no unit {match[2]}{describe_known(unit, TOKEN_UNITS)} (k is 1,024)")
    tokens = float(digits) * TOKEN_UNITS.get(unit, 1)
    if tokens < 1 or tokens != int(tokens):
        raise ValueError(f"{name} {text}: a whole number of tokens, at least 1, is needed")
    return int(tokens)


def parse_assignment(text: str, name: str, value: str) -> tuple[str, str]:
    """Reads "name=value".

        Args:
          text: The given text.
          name: The option's name, for messages.
    value: A placeholder for the value, for messages.

        Raises:
          ValueError: If a part is missing.
    """
    left, sign, right = text.partition("=")
    if not sign or not left.strip() or not right.strip():
        raise ValueError(f"{name} {text}: give NAME={value}, such as h200={value}")
    return left.strip(), right.strip()
