"""The grammar of tool calls, for outputs that must be calls: Lark in llguidance's variant, with the parameters' schemas.

`output_parser` parses matching output into calls whose arguments are valid under the schemas. One thing is not
enforced: a string inside an array or object may hold `</steptml:parameter>`, which would end the value early.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from step3_jax.json_schema import BLANKS, MAX_BYTES, check_schema, is_larger
from step3_jax.text.tool_call import (
    BLOCK_BEGIN,
    BLOCK_END,
    CALL_BEGIN,
    CALL_END,
    CALL_TYPE,
    INVOKE_BEGIN,
    INVOKE_END,
    PARAMETER_BEGIN,
    PARAMETER_END,
    SEPARATOR,
    Schema,
    Tool,
    collect_schemas,
    resolve_reference,
)

# Keywords that do not constrain a value.
_NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "nullable")
)
_OF_TEXT = frozenset(("type", "minLength", "maxLength", "pattern", "format"))
_FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": r"[a-zA-Z0-9_+-]{1,32}(\.[a-zA-Z0-9_+-]{1,32}){0,3}@([a-zA-Z0-9-]{1,63}\.){1,4}[a-zA-Z]{2,24}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[!#-;=?-Z_a-z~]+",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"
_JSON_TYPES = ("integer", "number", "boolean", "null", "array", "object")
_OF_OBJECT = frozenset(
    ("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "strict")
)
# Before and after the block: only what the model itself puts there.
_BLANKS = r"/[ \n]{0,3}/"


def tool_grammar(
    tools: Sequence[Tool], *, choice: str | None = None, is_parallel: bool = True, is_free: bool = False
) -> str:
    """The grammar of an output, after its reasoning, that calls tools.

    Args:
      tools: The tools, as in OpenAI's APIs.
      choice: The only tool that may be called; any if None.
      is_parallel: Whether there may be several calls.
      is_free: Whether text may come first, and calls may be left out.

    Returns:
      A grammar for `StructuredOutputsParams(grammar=...)`. Properties come in the schema's order, and no others.

    Raises:
      ValueError: If there is no such tool, or a schema cannot be enforced or is too large; the message names the place.
    """
    schemas = collect_schemas(tools)
    if choice is not None and choice not in schemas:
        raise ValueError(f"tool_choice names {choice!r}; the tools are {', '.join(schemas) or 'none'}")
    if not schemas:
        raise ValueError("a call is required but there are no tools; give tools with names")
    if is_larger(list(schemas.items()), MAX_BYTES, ignored=frozenset(("description",))):
        raise ValueError(
            f"tools: names and parameters are larger than {MAX_BYTES // 1024} KiB, descriptions not counted; leave some out"
        )
    rules = _Rules()
    names = [rules.add_tool(name, schema) for name, schema in schemas.items() if choice in (None, name)]
    block = f'{BLOCK_BEGIN} "\\n"? call{"+" if is_parallel else ""} {BLOCK_END}'
    lines = [
        f"start: TEXT ({block})?" if is_free else f"start: {_BLANKS} {block}",
        f'call: {CALL_BEGIN} "\\n"? {_quote(CALL_TYPE)} {SEPARATOR} ({" | ".join(names)}) {CALL_END} "\\n"?',
        *rules.lines,
        r"TEXT: /(?s:.*)/",
        # The parser accepts either as the end of a value.
        r"VALUE: TEXT & ~/(?s:.*)<\/steptml:(parameter|invoke)>(?s:.*)/",
    ]
    return "\n".join(lines) + "\n"


class _Rules:
    """Rules of the grammar, with unique names."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add_tool(self, name: str, schema: Schema) -> str:
        """Adds the call of a tool; returns the rule's name."""
        where = f"tools: {name}.parameters"
        check_schema(schema, where)
        _check_name(name, "tools: the name")
        if schema.get("type", "object") != "object":
            raise ValueError(f"{where} has type {schema['type']!r}; object is needed")
        unknown = [key for key in schema if key not in _NOTES and key not in _OF_OBJECT]
        if unknown:
            raise ValueError(f"{where}/{unknown[0]} cannot be enforced in a tool call; leave it out")
        properties, required = schema.get("properties") or {}, schema.get("required") or ()
        if not isinstance(properties, Mapping) or not isinstance(required, (list, tuple)):
            raise ValueError(f"{where} must have properties as an object, and required as a list of their names")
        missing = [str(key) for key in required if key not in properties]
        if missing:
            raise ValueError(f"{where}/required names {missing[0]!r}, which is not one of the properties")
        parts = [_quote(f'{INVOKE_BEGIN} name="{name}">')]
        for key, value in properties.items():
            place = f"{where}/properties/{key}"
            _check_name(key, place)
            values = self._add_values(f"{name}_{key}", value, schema, place, frozenset())
            head = _quote(f'{PARAMETER_BEGIN} name="{key}">')
            parameter = self._add(f"{name}_{key}", f"{head} ({' | '.join(values)})")
            parts.append(parameter + ("" if key in required else "?"))
        return self._add(name, " ".join([*parts, _quote(INVOKE_END)]))

    def _add_values(self, hint: str, schema: object, document: Schema, place: str, seen: frozenset[str]) -> list[str]:
        """Adds the alternatives of a value, including its end; returns the names of the rules, one of which must match."""
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise ValueError(f"{place} is {schema!r}; a schema is needed")
        own = {key: value for key, value in schema.items() if key not in _NOTES}
        for key in ("$ref", "anyOf", "oneOf", "enum", "const"):
            if key in own:
                # The alternatives repeat a type next to them.
                others = own.keys() - {key, "type"}
                if others:
                    raise ValueError(f"{place}/{min(others)} cannot be enforced together with {key}; move it into that")
                return self._add_alternatives(hint, key, own[key], document, place, seen)
        if not own:
            return [self._add_text(hint, {}, place)]
        types = own.get("type")
        if types is None:
            raise ValueError(f"{place} has no type, so {min(own)} cannot be enforced; give it a type")
        names = []
        for kind in [types] if isinstance(types, str) else types if isinstance(types, (list, tuple)) else ():
            if kind == "string":
                names.append(self._add_text(hint, own, place))
            elif kind in _JSON_TYPES:
                names.append(self._add_json(hint, own | {"type": kind}, document))
            else:
                raise ValueError(f"{place}/type is {kind!r}; allowed: string, {', '.join(_JSON_TYPES)}")
        return names

    def _add_alternatives(
        self, hint: str, key: str, given: object, document: Schema, place: str, seen: frozenset[str]
    ) -> list[str]:
        if key == "$ref":
            target = resolve_reference(str(given), document)
            if target is None or str(given) in seen:
                raise ValueError(f"{place}/$ref is {given!r}, which is not the schema of a value")
            return self._add_values(hint, target, document, place, seen | {str(given)})
        options = [given] if key == "const" else given
        if not isinstance(options, (list, tuple)) or not options:
            raise ValueError(f"{place}/{key} is {given!r}; a list of at least one is needed")
        if key in ("enum", "const"):
            return [self._add(hint, _quote(_to_text(value, place) + PARAMETER_END)) for value in options]
        parts = [
            self._add_values(hint, option, document, f"{place}/{key}/{index}", seen)
            for index, option in enumerate(options)
        ]
        return [name for names in parts for name in names]

    def _add_text(self, hint: str, schema: Schema, place: str) -> str:
        """Adds any text that the schema allows; it ends with the first end tag."""
        unknown = sorted(schema.keys() - _OF_TEXT) if schema.get("type") == "string" else ()
        if unknown:
            raise ValueError(f"{place}/{unknown[0]} cannot be enforced for a string; leave it out")
        parts = ["VALUE"]
        if "minLength" in schema or "maxLength" in schema:
            parts.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
        if "pattern" in schema:
            parts.append(f"/{_search_regex(str(schema['pattern']))}/")
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise ValueError(f"{place}/format is {schema['format']!r}; allowed: {', '.join(sorted(_FORMATS))}")
            parts.append(f"/{_escape(_FORMATS[schema['format']])}/")
        # The lexer does not know the tags, so the text includes its end.
        terminal = self._add(hint, " & ".join(parts), is_terminal=True)
        return self._add(hint, terminal, options=f"[suffix={_quote(PARAMETER_END)}]")

    def _add_json(self, hint: str, schema: Schema, document: Schema) -> str:
        shared = {key: document[key] for key in ("$defs", "definitions") if key in document}
        layout = {"x-guidance": {"whitespace_pattern": BLANKS}}
        value = self._add(hint, f"%json {json.dumps({**schema, **shared, **layout}, ensure_ascii=False)}")
        return self._add(hint, f"{value} {_quote(PARAMETER_END)}")

    def _add(self, hint: str, body: str, *, options: str = "", is_terminal: bool = False) -> str:
        """Adds a rule under a name that shows its origin."""
        name = f"r{len(self.lines)}_{re.sub('[^a-z0-9]+', '_', hint.lower())}"
        name = name.upper() if is_terminal else name
        self.lines.append(f"{name}{options}: {body}")
        return name


def _check_name(name: object, place: str) -> None:
    if not isinstance(name, str) or not name or any(letter in "\"'<>/=" or not letter.isprintable() for letter in name):
        raise ValueError(f"{place}: {name!r} cannot be written in a tool call; use letters, digits, _ and -")


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _to_text(value: object, place: str) -> str:
    """A value in the model's notation."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if PARAMETER_END in text or INVOKE_END in text:
        raise ValueError(f"{place} allows {text!r}, which holds the end of a value")
    return text


def _search_regex(pattern: str) -> str:
    """A regular expression for whole texts from one that may match anywhere, as in JSON schemas."""
    is_from_start = pattern.startswith("^")
    body = pattern[is_from_start:]
    is_to_end = body.endswith("$") and (len(body) - 1 - len(body[:-1].rstrip("\\"))) % 2 == 0
    body = body[: len(body) - is_to_end]
    return f"{'' if is_from_start else '(?s:.*)'}({_escape(body)}){'' if is_to_end else '(?s:.*)'}"


def _escape(regex: str) -> str:
    """A regular expression for a place between slashes, with the letters that JSON schemas mean by \\d and \\w."""
    classes = {"d": "[0-9]", "w": "[0-9A-Za-z_]"}
    text = re.sub(r"\\(.)|/", lambda found: classes.get(found[1] or "", found[0] if found[1] else r"\/"), regex)
    return text.replace("\n", r"\n")
