"""The checkpoint's own tokenizer, through the `tokenizers` library.

Ids of control tokens are looked up by name and never assumed. User text goes through a second tokenizer
without control tokens, so that `<im_patch>` or `<think>` typed by a user stays text.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from step3_jax.stored_file import read_json_object, read_text
from step3_jax.text.images import ImageTokenIds
from step3_jax.text.vocabulary import (
    added_tokens,
    added_tokens_alone,
    byte_alphabet,
    hide_letters,
    is_byte_level,
    is_control_token,
    without_control_tokens,
)

# Characters, or ids, that take about a millisecond.
_SHORT = 2**12


class Tokenizer:
    """Text to token ids and back. Safe to share between threads."""

    def __init__(
        self,
        description: str,
        *,
        bos: object = None,
        eos: Sequence[object] = (),
        source: str = "tokenizer.json",
    ) -> None:
        """Builds a tokenizer.

        Args:
          description: Text of a `tokenizer.json`.
          bos: The token that starts a sequence, by id or name; None if there is none.
          eos: The tokens that end a sequence, by ids or names. As both come from files, any type is checked.
          source: The origin of the description, for messages.

        Raises:
          ValueError: If the description cannot be used, or a name or id is unknown.
        """
        self._source = source
        self._description = description
        try:
            stored = json.loads(description)
            added_tokens(stored)
            self._full = tokenizers.Tokenizer.from_str(description)
            added = self._full.get_added_tokens_decoder()
            self._control = {
                token.content: number
                for number, token in added.items()
                if is_control_token(token.content, is_special=token.special)
            }
            words = {token.content: number for number, token in added.items() if token.content not in self._control}
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(without_control_tokens(stored, words)))
            self._splitter = tokenizers.Tokenizer.from_str(json.dumps(added_tokens_alone(stored)))
        except Exception as error:  # The library raises bare Exception for a file it cannot read.
            raise ValueError(f"{source} is not a usable tokenizer description: {error}") from error
        # A training setting left in the file must never truncate or pad a prompt.
        for tokenizer in (self._full, self._plain, self._splitter):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._special = {number for number, token in added.items() if token.special}
        self._added = dict(self._splitter.get_added_tokens_decoder())
        # Vocabularies that are not a table number added tokens after their end, in order.
        self._plain_ids = {self._plain.token_to_id(name): number for name, number in words.items()}
        vocabulary = self._full.get_vocab(with_added_tokens=True)
        self._num_ids = max(vocabulary.values(), default=-1) + 1
        self._longest = max(map(len, vocabulary), default=0)
        self._byte_of = byte_alphabet() if is_byte_level(stored.get("decoder")) else None
        self._bos = None if bos is None else self._resolve(bos, "bos")
        self._eos = tuple(dict.fromkeys(self._resolve(token, "eos") for token in eos))

    @classmethod
    def load(cls, folder: str | Path, *, bos_id: int | None = None, eos_ids: Sequence[int] | None = None) -> Tokenizer:
        """Reads `tokenizer.json` of a checkpoint; its `tokenizer_class` is ignored.

        Args:
          folder: Folder of the checkpoint.
          bos_id: BOS token. By default from `generation_config.json`, `config.json` or
            `tokenizer_config.json`, the first that names it.
          eos_ids: EOS tokens; by default found in the same way.

        Returns:
          The tokenizer.

        Raises:
          ValueError: If a file is missing or unusable.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            description = read_text(path)
        except FileNotFoundError:
            raise ValueError(f"there is no {path}; give the checkpoint's folder.") from None
        bos: object = bos_id
        eos: object = eos_ids
        for name in ("generation_config.json", "config.json"):
            stored = read_json_object(folder / name)
            bos = stored.get("bos_token_id") if bos is None else bos
            eos = stored.get("eos_token_id") if eos is None else eos
        stored = read_json_object(folder / "tokenizer_config.json")
        bos = token_name(stored.get("bos_token")) if bos is None else bos
        eos = token_name(stored.get("eos_token")) if eos is None else eos
        ends = eos if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
        return cls(description, bos=bos, eos=ends, source=str(path))

    @property
    def description(self) -> str:
        """Text of the `tokenizer.json`."""
        return self._description

    @property
    def num_ids(self) -> int:
        """The largest token id plus one."""
        return self._num_ids

    @property
    def longest(self) -> int | None:
        """The most characters that one token stands for; None if this tokenizer's tokens have no fixed bytes."""
        return None if self._byte_of is None else self._longest

    @property
    def bos_id(self) -> int:
        """Id of the token that starts a sequence. Raises ValueError if the checkpoint names none."""
        if self._bos is None:
            raise ValueError(f"{self._source}: no file of the checkpoint names a BOS token; give bos_id.")
        return self._bos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a sequence; empty if the checkpoint names none."""
        return self._eos

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(..., skip_special_tokens=True)` leaves out."""
        return frozenset(self._special)

    @property
    def control_tokens(self) -> dict[str, int]:
        """Names and ids of all tokens that control the model, such as `<im_patch>` and `<think>`; see `is_control_token`."""
        return dict(self._control)

    def control_id(self, name: str) -> int:
        """Id of a control token such as `<think>`.

        Args:
          name: The token's text.

        Returns:
          Its id.

        Raises:
          ValueError: If the checkpoint has no such control token.
        """
        if name not in self._control:
            raise ValueError(f"{self._source} has no control token {name!r}, which is needed here.")
        return self._control[name]

    def image_token_ids(self) -> ImageTokenIds:
        """Ids of the six tokens that represent an image. Raises ValueError naming the missing ones."""
        names = {name: f"<{name}>" for name in ImageTokenIds.__dataclass_fields__}
        missing = [token for token in names.values() if token not in self._control]
        if missing:
            raise ValueError(
                f"{self._source} has no control token(s) {', '.join(missing)}, so it does not support images."
            )
        return ImageTokenIds(**{name: self._control[token] for name, token in names.items()})

    def encode(self, text: str, *, allow_control: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: Any text.
          allow_control: Whether `<im_patch>` and the like in the text become control tokens. Use False for
            user text.
          add_bos: Whether to prepend BOS.

        Returns:
          The ids. The tokenizer's own template of BOS and EOS tokens is never applied.

        Raises:
          ValueError: If the text cannot be encoded as UTF-8, or there is no BOS token to add.
        """
        ids = self._run(self._full if allow_control else self._plain, text).ids
        if not allow_control:
            ids = [self._plain_ids.get(token, token) for token in ids]
        return [self.bos_id, *ids] if add_bos else ids

    def encode_user_text(self, text: str) -> list[int]:
        """Token ids of text from an untrusted user: never control tokens. See `encode`."""
        return self.encode(text, allow_control=False)

    def encode_guarded(self, text: str, opening: str, closing: str) -> list[int]:
        """Token ids of a text in which some spans are untrusted.

        Plain text on both sides of a mark is encoded in one piece, so marks do not change how words are split.

        Args:
          text: The text, with each untrusted span between the two marks. Spans do not nest.
          opening: Mark before an untrusted span, a single character found nowhere else.
          closing: Mark after it.

        Returns:
          The ids of the text without marks, with control tokens recognised only outside the marks.

        Raises:
          ValueError: If the text is not valid Unicode.
        """
        guarded = re.compile(f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}")
        clean = guarded.sub(r"\1", text)
        hidden = guarded.sub(_hide_stretch, text)
        # Each span had two marks, and so did those before it.
        places = ((n, *match.span()) for n, match in enumerate(guarded.finditer(text)))
        if self._is_safe(clean, hidden, [(start - 2 * n, end - 2 * (n + 1)) for n, start, end in places]):
            # The library's own ids, with all flags of added tokens.
            return self.encode(clean)
        ids: list[int] = []
        position = 0
        for start, end, token in self._split(hidden):
            ids += self.encode_user_text(clean[position:start])
            ids.append(self._control[token.content])
            position = end
        return ids + self.encode_user_text(clean[position:])

    def find_control(self, text: str) -> list[tuple[int, int, str]]:
        """Where control tokens would be recognised in a text: (start, end, name) of each, in order.

        Raises:
          ValueError: If the text is not valid Unicode.
        """
        found = []
        for start, end, token in self._split(text):
            # A token may absorb the whitespace next to it.
            num_before = len(text[start:end]) - len(text[start:end].lstrip()) if token.lstrip else 0
            num_after = len(text[start:end]) - len(text[start:end].rstrip()) if token.rstrip else 0
            found.append((start + num_before, end - num_after, token.content))
        return found

    def _is_safe(self, clean: str, hidden: str, stretches: Sequence[tuple[int, int]]) -> bool:
        """Whether untrusted spans neither create nor destroy control tokens of a text; `hidden` has their letters hidden."""
        found = self.find_control(clean)
        ends = [end for _, end in stretches]
        for start, end, _ in found:
            index = bisect.bisect_right(ends, start)
            if index < len(stretches) and stretches[index][0] < end:
                return False
        return set(self.find_control(hidden)) <= set(found)

    def _split(self, text: str) -> list[tuple[int, int, tokenizers.AddedToken]]:
        """The control tokens of a text as the library finds them, with the whitespace that each absorbs."""
        encoding = self._run(self._splitter, text)
        matches = ((*span, self._added.get(token)) for token, span in zip(encoding.ids, encoding.offsets, strict=True))
        return [
            (start, end, token) for start, end, token in matches if token is not None and token.content in self._control
        ]

    def _run(self, tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        try:
            if len(text) <= _SHORT:
                return tokenizer.encode(text, add_special_tokens=False)
            # Only the library's calls for batches let other threads run meanwhile: a service streams on while it encodes.
            return tokenizer.encode_batch([text], add_special_tokens=False)[0]
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"The text cannot be encoded, as it is not valid Unicode: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Args:
          ids: Token ids; an id within the model's vocabulary that has no token gives no text.
          skip_special_tokens: Whether to leave out the tokens that the file marks as special. In Step3
            `<think>` and the tool tokens are not.

        Returns:
          The text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
          ValueError: If an id is negative or beyond 32 bits.
        """
        try:
            if len(ids) <= _SHORT:
                return self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return self._full.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        except (OverflowError, TypeError) as error:
            raise ValueError(f"Token ids must be whole numbers of at least 0: {error}") from error

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to the text; None if this tokenizer's tokens have no fixed
        bytes.

        Byte-level tokenizers, such as Step3's, have them. An id without a token gives no bytes.

        Raises:
          ValueError: If the id is negative or beyond 32 bits.
        """
        if self._byte_of is None:
            return None
        try:
            token = self._full.id_to_token(token_id)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"Token id {token_id!r} is not a whole number of at least 0.") from error
        if token is None:
            return b""
        if all(letter in self._byte_of for letter in token):
            return bytes(self._byte_of[letter] for letter in token)
        return token.encode("utf-8")

    def stream_step(self, stream: DecodeStream, token_id: int) -> str:
        """The text that `token_id` completes in the library's own stream of decoding."""
        return stream.step(self._full, token_id) or ""

    def _resolve(self, token: object, role: str) -> int:
        if isinstance(token, str):
            number = self._full.token_to_id(token)
            if number is not None:
                return number
        elif isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            return token
        raise ValueError(f"{self._source}: the {role} token is given as {token!r}, which is not a token of this file.")


def token_name(stored: object) -> str | None:
    """A token's text as `tokenizer_config.json` stores it: bare, or as an object with `content`."""
    name = stored.get("content") if isinstance(stored, dict) else stored
    return name if isinstance(name, str) else None


def _hide_stretch(match: re.Match[str]) -> str:
    return hide_letters(match[1])
