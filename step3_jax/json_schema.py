"""The parts of a JSON schema, which schemas are refused up front, and the layout of generated JSON."""

from __future__ import annotations

from collections.abc import Mapping

# Whitespace between the tokens of generated JSON, as a regular expression: one blank or none, as small models get lost
# in blanks, and each costs a step.
BLANKS = " "
# Beyond anything written by hand; a larger one is a mistake or an attack.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_PROPERTIES = 2000

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Values, not schemas.
_DATA = ("const", "enum", "default", "examples")
# From older drafts; llguidance would ignore them.
_OUTDATED = {
    "additionalItems": "use items together with prefixItems",
    "dependencies": "use dependentRequired",
    "disallow": "use a list of types",
    "divisibleBy": "use multipleOf",
    "extends": "use allOf",
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def is_larger(value: object, num_bytes: int, *, ignored: frozenset[str] = frozenset()) -> bool:
    """Whether the JSON text of a value is surely larger than this. Looks at no more of the value than that.

    Args:
      value: A value of any size, such as an untrusted schema before anything else looks at it.
      num_bytes: The size.
      ignored: Keys whose texts do not count.
    """
    waiting, size = [value], 0
    while waiting and size <= num_bytes:
        node = waiting.pop()
        if isinstance(node, str):
            size += len(node) + 2
        elif isinstance(node, (Mapping, list, tuple)):
            # Brackets and commas, before anything in it is looked at.
            size += len(node) + 1
            if size > num_bytes:
                break
            if isinstance(node, Mapping):
                size += sum(len(key) for key in node if isinstance(key, str))
                waiting += [child for key, child in node.items() if key not in ignored or not isinstance(child, str)]
            else:
                waiting += node
        else:
            size += 1
    return size > num_bytes


def check_schema(schema: Mapping[str, object], name: str) -> None:
    """Refuses a JSON schema that is too large, or that would be enforced only in part.

    Args:
      schema: The schema.
      name: Its name in messages.

    Raises:
      ValueError: For nesting deeper than 32, more than 2,000 properties, a `$ref` outside the document, or a keyword that is
        outdated or has a value of the wrong type; the message names the place.
    """
    num_properties = 0
    waiting: list[tuple[str, object, int]] = [("", schema, 0)]
    while waiting:
        path, node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}{path[:200]} is nested deeper than {MAX_DEPTH}; flatten the schema")
        if isinstance(node, Mapping):
            _check_keywords(node, name + path)
            properties = node.get("properties")
            num_properties += len(properties) if isinstance(properties, Mapping) else 0
            if num_properties > MAX_PROPERTIES:
                raise ValueError(f"{name} has more than {MAX_PROPERTIES:,} properties; leave some out")
        waiting += [(f"{path}{step}", child, depth + 1) for step, child in subschemas(node)]


def subschemas(schema: object) -> list[tuple[str, object]]:
    """The direct subschemas of a schema, each with its place as the end of a JSON pointer."""
    if not isinstance(schema, Mapping):
        return []
    found: list[tuple[str, object]] = []
    for key, value in schema.items():
        if key in _DATA:
            continue
        if key in _MAPS and isinstance(value, Mapping):
            found += [(f"/{key}/{name}", child) for name, child in value.items()]
        elif isinstance(value, Mapping):
            found.append((f"/{key}", value))
        elif isinstance(value, (list, tuple)):
            found += [(f"/{key}/{place}", child) for place, child in enumerate(value) if isinstance(child, Mapping)]
    return found


def _check_keywords(schema: Mapping[str, object], where: str) -> None:
    for key, value in schema.items():
        if not isinstance(key, str):
            raise ValueError(f"{where} has the key {key!r}; text is needed")
        if key in _OUTDATED:
            raise ValueError(f"{where}/{key} is of an older draft of JSON schema: {_OUTDATED[key]}")
        if key == "items" and isinstance(value, (list, tuple)):
            raise ValueError(f"{where}/items is a list, as in older drafts of JSON schema: use prefixItems")
        if key == "x-guidance":
            raise ValueError(f"{where}/x-guidance changes how strictly the schema is enforced: leave it out")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise ValueError(
                f"{where}/$ref is {value!r}; only places in the schema itself, such as '#/$defs/city', are allowed"
            )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _COUNTS and not (is_number and value >= 0 and value == int(value)):  # type: ignore[operator, call-overload]
            raise ValueError(f"{where}/{key} is {value!r}; a whole number of at least 0 is needed")
        if key in _BOUNDS and not is_number:
            raise ValueError(f"{where}/{key} is {value!r}; a number is needed")
