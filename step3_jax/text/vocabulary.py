"""What a `tokenizer.json` says of its tokens, read without running the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping

# A rare ideograph, and the last character for private use: no added token has them, no normalisation changes them.
_HIDDEN_LETTER, _HIDDEN_MARK = "\U0002fa1d", "\U0010fffd"


def is_control_token(name: str, *, is_special: bool) -> bool:
    """Whether an added token steers the model, so that a user may not type it.

    Step3 marks only some of those as special: `<think>` and the tool tokens are not. All are written as `<...>`, and the
    words that fine-tuning adds are not.
    """
    return is_special or (name.startswith("<") and name.endswith(">"))


def added_tokens(stored: dict[str, object]) -> list[dict[str, object]]:
    """The added tokens of a description. Raises ValueError if they are not of the known form."""
    added = stored.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and "content" in token for token in added):
        raise ValueError("its added_tokens are no list of tokens")
    return added


def without_control_tokens(stored: dict[str, object], id_of: Mapping[str, int]) -> dict[str, object]:
    """The same description without control tokens, and with no way for merges to build one of them.

    Args:
      stored: The description.
      id_of: Ids of the added tokens that stay, by name.

    Raises:
      ValueError: If the description is not of the known form.
    """
    added, model = added_tokens(stored), stored.get("model")
    if not isinstance(model, dict):
        raise ValueError("it lacks a model")
    kept = [token for token in added if token["content"] in id_of]
    # Single letters stay: they are the byte alphabet, without which some text could not be encoded at all.
    names = {str(token["content"]) for token in added if len(str(token["content"])) > 1} - id_of.keys()
    plain = {**stored, "added_tokens": kept, "post_processor": None}
    model = dict(model)
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in names}
        # The library numbers added tokens anew, unless the vocabulary has them.
        model["vocab"] |= id_of
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in names and not names.intersection(pair)]
    plain["model"] = model
    return plain


def added_tokens_alone(stored: dict[str, object]) -> dict[str, object]:
    """A description that finds the added tokens as the whole one does, and makes one token of all between them."""
    model = {"type": "WordLevel", "vocab": {"\0": 0}, "unk_token": "\0"}
    return {**stored, "model": model, "pre_tokenizer": None, "post_processor": None, "decoder": None}


def hide_letters(text: str) -> str:
    """A text of the same length that no added token is found in, with blanks and word borders where they were."""
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
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table), as letter to byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
