"""What a `tokenizer.json` says about its tokens, without running the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping

# A rare ideograph, and the last private-use character: no added token has them, no normalisation changes them.
_HIDDEN_LETTER, _HIDDEN_MARK = "\U0002fa1d", "\U0010fffd"


def is_control_token(name: str, *, is_special: bool) -> bool:
    """Whether an added token controls the model, so that a user may not type it.

    Step3 marks only some of those as special: `<think>` and the tool tokens are not. All are written as `<...>`, unlike
    words that fine-tuning adds.
    """
    return is_special or (name.startswith("<") and name.endswith(">"))


def added_tokens(stored: dict[str, object]) -> list[dict[str, object]]:
    """The added tokens of a description. Raises ValueError if they do not have the known form."""
    added = stored.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and "content" in token for token in added):
        raise ValueError("its added_tokens are not a list of tokens")
    return added


def without_control_tokens(stored: dict[str, object], id_of: Mapping[str, int]) -> dict[str, object]:
    """The same description without control tokens, and without merges that could build one.

    Args:
      stored: The description.
      id_of: Ids of the added tokens to keep, by name.

    Raises:
      ValueError: If the description does not have the known form.
    """
    added, model = added_tokens(stored), stored.get("model")
    if not isinstance(model, dict):
        raise ValueError("it lacks a model")
    kept = [token for token in added if token["content"] in id_of]
    # Keep single letters: they are the byte alphabet, without which some text could not be encoded at all.
    names = {str(token["content"]) for token in added if len(str(token["content"])) > 1} - id_of.keys()
    plain = {**stored, "added_tokens": kept, "post_processor": None}
    model = dict(model)
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in names}
        # The library renumbers added tokens, unless the vocabulary has them.
        model["vocab"] |= id_of
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in names and not names.intersection(pair)]
    plain["model"] = model
    return plain


def added_tokens_alone(stored: dict[str, object]) -> dict[str, object]:
    """A description that finds the same added tokens as the whole one, and makes one token of everything between them."""
    model = {"type": "WordLevel", "vocab": {"\0": 0}, "unk_token": "\0"}
    return {**stored, "model": model, "pre_tokenizer": None, "post_processor": None, "decoder": None}


def hide_letters(text: str) -> str:
    """A text of the same length without added tokens, with whitespace and word boundaries where they were."""
    return re.sub(r"\w", _HIDDEN_LETTER, re.sub(r"[^\w\s]", _HIDDEN_MARK, text))


def is_byte_level(decoder: object) -> bool:
    """Whether the `decoder` of a description joins the bytes of tokens, and does nothing else."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def byte_alphabet() -> dict[str, int]:
    """The byte of each letter in byte-level vocabularies (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
