"""The user's parameters for structured outputs: names as in vLLM. `grammar` enforces them."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Mapping, Sequence

from step3_jax.json_schema import MAX_BYTES, check_schema, is_larger

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class GrammarBusyError(ValueError):
    """A structured output whose grammar was not compiled, because others still are; it may be a little later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must match, in exactly one of the fields.

    In an output that starts with reasoning, it applies after `</think>`.

    Attributes:
      json: A JSON schema, as an object or its text; {} and True mean any object. Anything that cannot be enforced is
        refused, with its place.
      regex: A regular expression that matches the whole output, in Rust's syntax, without lookarounds.
      choice: The output is one of these texts.
      grammar: A context-free grammar: llguidance's variant of Lark, or GBNF.
      json_object: True for any JSON object.

    Raises:
      ValueError: If not exactly one is given, or it is malformed or too large.
    """

    json: Mapping[str, object] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        # False means no in vLLM too.
        given = [kind for kind in _KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise ValueError(f"structured_outputs has {found}; exactly one of {', '.join(_KINDS)} is needed")
        if self.json_object not in (None, False, True):
            raise ValueError(f"structured_outputs.json_object is {self.json_object!r}; True is needed")
        if not self.json_object and is_larger(getattr(self, self.kind), MAX_BYTES + 2):
            raise _refuse_size(self.kind)
        for kind in ("regex", "grammar"):
            value = getattr(self, kind)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"structured_outputs.{kind} is {value!r}; text of at least one character is needed")
        if self.choice is not None:
            texts = self.choice
            is_list = isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 0
            if not is_list or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(
                    f"structured_outputs.choice is {texts!r}; a list of texts is needed, none of them empty"
                )
            object.__setattr__(self, "choice", tuple(texts))
        if self.kind == "json" and not self.json_object:
            # A copy as text, so that later changes by the caller have no effect here.
            object.__setattr__(self, "json", json_module.dumps(_read_schema(self.json), ensure_ascii=False))
        if len(self.source.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise _refuse_size(self.kind)

    @property
    def kind(self) -> str:
        """Which one is given: json (json_object too), regex, choice or grammar."""
        if self.json_object:
            return "json"
        return next(kind for kind in _KINDS[:4] if getattr(self, kind) is not None and getattr(self, kind) is not False)

    @property
    def source(self) -> str:
        """The given value as text: a JSON list for choices."""
        if self.json_object:
            return '{"type": "object"}'
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False)


def _refuse_size(kind: str) -> ValueError:
    return ValueError(f"structured_outputs.{kind} is larger than {MAX_BYTES // 1024} KiB; shorten it")


def _read_schema(given: object) -> object:
    """A JSON schema, checked for keywords that llguidance would ignore."""
    schema = given
    if isinstance(given, str):
        try:
            schema = json_module.loads(given)
        except (json_module.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"structured_outputs.json is not valid JSON: {error}") from None
    if schema is True or schema == {}:
        return {"type": "object"}
    if not isinstance(schema, Mapping):
        raise ValueError(f"structured_outputs.json is {str(schema)[:80]}; a JSON schema, which is an object, is needed")
    check_schema(schema, "structured_outputs.json")
    try:
        return json_module.loads(json_module.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.json is not JSON: {error}") from None
