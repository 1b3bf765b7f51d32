"""The chat page: files that ship with the package, sent with headers that let the page do no more than it needs."""

from __future__ import annotations

import importlib.resources

from starlette.responses import Response

# The page's own scripts and styles, images of the conversation, requests to this server; no inline code, no other site, no
# frames around it, and no text that becomes HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
INDEX = "index.html"
# What may be asked for; a name that is not here is no path to anything.
FILES = (INDEX, "page.css", "page.js", "answer.js", "element.js", "image.js", "markup.js", "stream.js")


def page_response(name: str = INDEX) -> Response | None:
    """A file of the page.

    Args:
      name: `INDEX` is what `/` shows; it asks for the others as `page/NAME`, relative to its own address, so that it works
        below a path of a proxy too.

    Returns:
      The file with its headers; None if the page has no such file. Both need no key: they tell nothing about the model,
      and the page is where a person enters the key.
    """
    if name not in FILES:
        return None
    content = importlib.resources.files("step3_jax.server").joinpath("page", name).read_bytes()
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
