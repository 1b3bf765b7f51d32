"""What a `tokenizer.json` says of its tokens, read without running the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable


def without_control_tokens(stored: dict[str, object]) -> dict[str, object]:
    """The same description without added tokens, and with no way for merges to build one of them.

    Raises ValueError if the description is not of the known form.
    """
    added, model = stored.get("added_tokens") or [], stored.get("model")
    if not isinstance(added, list) or not isinstance(model, dict):
        raise ValueError("it lacks a model, or its added_tokens are no list")
    names = {token["content"] for token in added}
    # Single letters stay: they are the byte alphabet, without which some text could not be encoded at all.
    names = {name for name in names if len(name) > 1}
    plain = {**stored, "added_tokens": [], "post_processor": None}
    model = dict(model)
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in names}
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in names and not names.intersection(pair)]
    plain["model"] = model
    return plain


def control_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds control tokens as the library does: of those that begin first the longest."""
    ordered = sorted(names, key=len, reverse=True)
    # Without any token the pattern must match nothing.
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def is_byte_level(decoder: object) -> bool:
    """Whether the `decoder` of a description joins the bytes of tokens, and does nothing else."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table), as letter to byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
