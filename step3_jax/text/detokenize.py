"""Text of a sequence that is still being generated: complete characters only, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from tokenizers.decoders import DecodeStream

from step3_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids into text as they arrive.

    The concatenated results of `push` and `finish` are `tokenizer.decode` of all ids. Time and memory per
    token do not grow with the sequence for byte-level tokenizers such as Step3's.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        """Starts an empty text.

        Args:
          tokenizer: The tokenizer of the ids.
          skip_special_tokens: As in `Tokenizer.decode`.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._is_bytes = tokenizer.token_bytes(0) is not None
        # A byte-level token may be part of a character; this keeps the bytes of an
        # unfinished one.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Other vocabularies decode a token depending on its neighbours, which the library's stream keeps.
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_letters = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens.

        Args:
          ids: New token ids.

        Returns:
          The new text, up to the last complete character.

        Raises:
          ValueError: If an id is negative or beyond 32 bits.
        """
        if self._is_bytes:
            pieces = [self._tokenizer.token_bytes(token) or b"" for token in ids if token not in self._skipped]
            return self._decoder.decode(b"".join(pieces))
        text = ""
        for token in ids:
            if token not in self._skipped:
                self._ids.append(token)
                text += self._tokenizer.stream_step(self._stream, token)
        self._num_letters += len(text)
        return text

    def finish(self) -> str:
        """Ends the sequence.

        Returns:
          The text held back: U+FFFD for an incomplete character, else nothing.
        """
        if self._is_bytes:
            return self._decoder.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[self._num_letters :]


class StopStrings:
    """Watches a text for strings that end it, across the boundaries of its pieces.

    The result does not depend on those boundaries: the string that is complete first wins, and of two that are
    complete at the same letter, the longer.

    Attributes:
      matched: The string that ended the text; None until then.
    """

    def __init__(self, stops: str | Sequence[str], include: bool = False, *, after: str = "") -> None:
        """Starts with an empty text.

        Args:
          stops: The strings that end the text; empty for a text that only the model ends.
          include: Whether the string itself is part of the text.
          after: Text that must come before the strings count, such as the end of the reasoning; "" to watch from the start.

        Raises:
          ValueError: If a string is empty or not a string.
        """
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"A stop string must be text of at least one character, not {stop!r}.")
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._after = after
        self._unwatched = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Takes the next piece of text.

        Args:
          text: New text.
          may_stop: Whether a stop string that ends in it ends the text. One that ends later may still start in it.

        Returns:
          Text that is certain to be part of the result, and whether the text has ended. Anything after the
          end is dropped.
        """
        if self.matched is not None:
            return "", True
        passed, text = self._pass_unwatched(text)
        before = len(self._held)
        self._held += text
        # Only strings that end in the new text: the rest was checked when it arrived.
        starts = ((stop, self._held.find(stop, max(0, before - len(stop) + 1))) for stop in self._stops)
        found = [(start + len(stop), start, stop) for stop, start in starts if start >= 0]
        if found and may_stop:
            end, start, self.matched = min(found)
            emitted, self._held = self._held[: end if self._include else start], ""
            return passed + emitted, True
        keep = self._partial_length()
        cut = len(self._held) - keep
        emitted, self._held = self._held[:cut], self._held[cut:]
        return passed + emitted, False

    def flush(self) -> str:
        """Returns the text held back as the possible start of a stop string, once no more text will come."""
        emitted, self._held = self._held, ""
        return emitted

    def _pass_unwatched(self, text: str) -> tuple[str, str]:
        """The part of `text` up to the end of `after`, which is not searched, and the rest."""
        if not self._after:
            return "", text
        seen = self._unwatched + text
        start = seen.find(self._after)
        if start < 0:
            self._unwatched = seen[len(seen) - min(len(seen), len(self._after) - 1) :]
            return text, ""
        rest = seen[start + len(self._after) :]
        self._after = ""
        return text[: len(text) - len(rest)], rest

    def _partial_length(self) -> int:
        """Letters at the end of the held text that may be the start of a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
