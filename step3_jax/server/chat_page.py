"""The chat page: files that ship with the package, sent with headers that limit the page to what it needs."""

from __future__ import annotations

import importlib.resources

from starlette.responses import Response

# The page's own scripts and styles, images of the conversation, requests to this server; no inline code, no other sites, no
# embedding in frames, and no text that becomes HTML.
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
# The files that can be requested; any other name leads nowhere.
FILES = (INDEX, "page.css", "page.js", "answer.js", "element.js", "image.js", "markup.js", "stream.js")


def page_response(name: str = INDEX) -> Response | None:
    """A file of the page.

    Args:
      name: `INDEX` is what `/` shows; it requests the others as `page/NAME`, relative to its own address, so that it also
        works below a proxy's path.

    Returns:
      The file with its headers; None if the page has no such file. No key is needed: they reveal nothing about the model,
      and the page is where a user enters the key.
    """
    if name not in FILES:
        return None
    content = importlib.resources.files("step3_jax.server").joinpath("page", name).read_bytes()
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
