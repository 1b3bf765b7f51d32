"""The page about the API: its description as plain HTML, without scripts or requests to other sites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from starlette.responses import Response

_HEADERS = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}


def docs_response(described: Mapping[str, Any]) -> Response:
    """The page of an OpenAPI description: each operation, then each schema with its fields."""
    title = escape(f"{described['info']['title']} {described['info']['version']}")
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>']
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            note = " A key is needed." if "security" in operation else ""
            parts.append(
                f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation.get('description', ''))}{note}</p>"
            )
            responses = {"body": operation["requestBody"]} if "requestBody" in operation else {}
            for name, one in (responses | operation["responses"]).items():
                kinds = [f"{kind}, {_describe(found['schema'])}" for kind, found in one.get("content", {}).items()]
                parts.append(f"<p>{name}: {escape(one.get('description', ''))} ({'; '.join(kinds)})</p>")
    for name, schema in described["components"]["schemas"].items():
        parts.append(f'<h2 id="{name}">{name}</h2><pre>{escape(schema.get("description", ""))}</pre><ul>')
        for field, value in schema.get("properties", {}).items():
            note = ", required" if field in schema.get("required", ()) else ""
            parts.append(f"<li><code>{escape(field)}</code>: {_describe(value)}{note}</li>")
        parts.append("</ul>")
    return Response("\n".join(parts), media_type="text/html", headers=_HEADERS)


def _describe(schema: Mapping[str, Any]) -> str:
    """A schema in a few words; one with a name is a link to its place on the page."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema or "const" in schema:
        return " or ".join(escape(json.dumps(value)) for value in schema.get("enum", [schema.get("const")]))
    if "items" in schema:
        return f"list of {_describe(schema['items'])}"
    options = schema.get("anyOf") or schema.get("oneOf")
    return " or ".join(map(_describe, options)) if options else escape(str(schema.get("type", "any value")))
