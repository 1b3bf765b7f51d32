"""Server-sent events."""

from __future__ import annotations

# Proxies must pass pieces on as they arrive: the last header is for nginx.
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
# A comment, which clients ignore.
KEEP_ALIVE = b": keep-alive\n\n"


def format_event(data: bytes) -> bytes:
    """One event of JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n"
