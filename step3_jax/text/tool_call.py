"""The model's tool calls: markers, parameters as JSON values, and the call that users get.

The model writes each parameter as plain text between two tags; the tool's JSON schema says what it means (4, "4" or
null).
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping

BLOCK_BEGIN, BLOCK_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
CALL_BEGIN, CALL_END = "<｜tool_call_begin｜>", "<｜tool_call_end｜>"
SEPARATOR = "<｜tool_sep｜>"
# An opening tag continues with ` name="...">`.
INVOKE_BEGIN, INVOKE_END = "<steptml:invoke", "</steptml:invoke>"
PARAMETER_BEGIN, PARAMETER_END = "<steptml:parameter", "</steptml:parameter>"
CALL_TYPE = "function"

Tool = Mapping[str, object]
Schema = Mapping[str, object]

# The same depth as for a request's own JSON.
_MAX_DEPTH = 64
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NAMES_OF_NULL = ("null", "None")
_BOOLEANS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A complete tool call.

    Attributes:
      id: The call's id, by which the tool's result refers to it.
      name: The tool.
      arguments: JSON text of an object.
    """

    id: str
    name: str
    arguments: str


def make_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def collect_schemas(tools: Iterable[Tool]) -> dict[str, Schema]:
    """The schema of the parameters of each tool.

    Args:
      tools: Tools as in OpenAI's APIs: {"type": "function", "function": {"name": ..., "parameters": {...}}}, or the
        inner object itself.

    Returns:
      Schemas by tool name; {} for a tool without one. Anything malformed is left out.
    """
    schemas: dict[str, Schema] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            parameters = function.get("parameters")
            schemas[name] = parameters if isinstance(parameters, Mapping) else {}
    return schemas


def cast_arguments(parameters: Mapping[str, str], schema: Schema) -> str:
    """The arguments of a call as JSON text.

    Args:
      parameters: The raw text of each parameter.
      schema: The JSON schema of the tool's parameters.

    Returns:
      Text of a JSON object, with values from `cast_parameter`.
    """
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    values = {name: cast_parameter(text, properties.get(name), schema) for name, text in parameters.items()}
    encoded = json.dumps(values, ensure_ascii=False)
    # Half a surrogate pair, which JSON can escape, has no UTF-8.
    return encoded if _is_utf8(encoded) else json.dumps(values)


def cast_parameter(text: str, schema: object, document: Schema) -> object:
    """The value of a parameter's text.

    Args:
      text: The raw text, including whitespace.
      schema: The parameter's JSON schema. Types are read from `type`, `anyOf`, `oneOf`, `allOf`, `enum`, `const`, `nullable`
        and local `$ref`s.
      document: The schema that `$ref`s refer to.

    Returns:
      A value of an allowed type, preferring one other than a string. The text itself if only strings are
      allowed, no type is known, or nothing else fits: a call is never lost because of a wrong value.
    """
    types = _allowed_types(schema, document)
    stripped = text.strip()
    if "null" in types and stripped in _NAMES_OF_NULL:
        return None
    if types & {"integer", "number"}:
        number = _to_number(stripped, is_integer="number" not in types)
        if number is not None:
            return number
    if "boolean" in types and stripped.lower() in _BOOLEANS:
        return _BOOLEANS[stripped.lower()]
    wanted = tuple(kind for kind, name in ((list, "array"), (dict, "object")) if name in types)
    if wanted:
        value = _to_container(stripped)
        if isinstance(value, wanted):
            return value
    return text


def _allowed_types(schema: object, document: Schema) -> frozenset[str]:
    """Names of the JSON types that a schema allows; empty if it does not say."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        # A schema may refer to itself.
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        found |= _stated_types(part)
        for key in ("anyOf", "oneOf", "allOf"):
            options = part.get(key)
            waiting += options if isinstance(options, (list, tuple)) else ()
        if isinstance(reference := part.get("$ref"), str):
            waiting.append(resolve_reference(reference, document))
    return frozenset(found)


def _stated_types(schema: Schema) -> set[str]:
    """The types that a schema names itself, or the types of its allowed values."""
    stated = schema.get("type")
    types = {stated} if isinstance(stated, str) else set()
    if isinstance(stated, (list, tuple)):
        types = {name for name in stated if isinstance(name, str)}
    elif not types:
        values = schema.get("enum")
        values = [*values] if isinstance(values, (list, tuple)) else []
        types = {_type_of(value) for value in [*values, *([schema["const"]] if "const" in schema else [])]}
    return types | ({"null"} if schema.get("nullable") is True else set())


def resolve_reference(reference: str, document: Schema) -> object:
    """The target of a reference in a schema, such as `#/$defs/city`; None if it does not exist."""
    first, *path = reference.split("/")
    found: object = document if first == "#" else None
    for part in path:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (Mapping, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _to_number(text: str, *, is_integer: bool) -> int | float | None:
    try:
        if _INTEGER.fullmatch(text):
            return int(text)
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
    except ValueError:  # More digits than Python turns into a number.
        return None
    if not math.isfinite(number):
        return None
    if is_integer:
        return int(number) if number.is_integer() else None
    return number


def _to_container(text: str) -> object:
    """An array or object from JSON text, or from Python's spelling of it; None if it is neither."""
    if not text.startswith(("[", "{")) or _is_deep(text):
        return None
    for read in (_from_json, _from_python):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _from_json(text: str) -> object:
    return json.loads(text, parse_constant=_refuse_constant)


def _from_python(text: str) -> object:
    value = ast.literal_eval(text)
    # Python has sets, bytes and infinities, which JSON cannot express.
    return json.loads(json.dumps(value, allow_nan=False))


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _is_deep(text: str) -> bool:
    """Whether brackets outside JSON strings nest deeper than allowed; Python's parsers recurse."""
    depth, is_string, is_escaped = 0, False, False
    for letter in text:
        if is_string:
            is_string = is_escaped or letter != '"'
            is_escaped = letter == "\\" and not is_escaped
        elif letter == '"':
            is_string = True
        elif letter in "[{":
            depth += 1
            if depth > _MAX_DEPTH:
                return True
        elif letter in "]}":
            depth -= 1
    return False


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
