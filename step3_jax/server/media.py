"""Images in messages from the network: where they may come from, and how large they may be."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from step3_jax.server.fetch import MediaFetcher
from step3_jax.text.image_input import WEB_FORMATS, read_image
from step3_jax.text.message import Message, collect_images, replace_images

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Limits of one request.

    Attributes:
      max_images: Images of all messages together.
      max_pixels: Most pixels of an image, width times height, according to its header.
      max_bytes: Most bytes of an image's file.
    """

    max_images: int = 16
    max_pixels: int = 40_000_000
    max_bytes: int = 20 * 2**20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (0 if field.name == "max_images" else 1):
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it cannot be negative")


class MediaReader:
    """Turns the images of messages into bytes, off the event loop."""

    def __init__(
        self,
        limits: MediaLimits | None = None,
        *,
        fetcher: MediaFetcher | None = None,
        pool: concurrent.futures.Executor | None = None,
    ) -> None:
        """Takes limits, fetcher and threads.

        Args:
          limits: Limits of each request.
          fetcher: Fetches web addresses; without one they are refused.
          pool: Threads for decoding base64 and reading headers; those of the event loop if absent.
        """
        self._limits = MediaLimits() if limits is None else limits
        self._fetcher = fetcher
        self._pool = pool

    async def read(self, messages: Sequence[Message]) -> list[dict[str, object]]:
        """Reads the images of messages.

        Args:
          messages: As a client sent them: images are `data:` URLs, and web addresses where fetching is on. Other forms that
            `ChatTemplate.render` would take (paths, Pillow images) are refused.

        Returns:
          The same messages, each image as {"type": "image", "image": the bytes of its file}. Their headers are checked;
          their pixels are decoded when they are used.

        Raises:
          ValueError: For malformed messages, and for images that are too many, too large, from elsewhere, or of an
            unknown format; the message says which and what is allowed.
        """
        sources = await self._call(collect_images, messages)
        if not sources:
            return [dict(message) for message in messages]
        if len(sources) > self._limits.max_images:
            raise ValueError(f"the messages have {len(sources)} images; at most {self._limits.max_images} are allowed.")
        addresses = [_check_address(source, number) for number, source in enumerate(sources)]
        # One after the other: a request must not take all threads or connections.
        files = [await self._read_one(address) for address in addresses]
        return await self._call(replace_images, messages, files)

    async def _read_one(self, address: str) -> bytes:
        source: str | bytes = address
        if address[:5].lower() != "data:":
            if self._fetcher is None:
                raise ValueError(
                    f"Image {address[:80]!r} is not accepted: this server fetches nothing; send a "
                    "data:image/png;base64,... URL."
                )
            source = await self._fetcher.fetch(address, max_bytes=self._limits.max_bytes)
        return await self._call(self._check, source)

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))

    def _check(self, source: str | bytes) -> bytes:
        limits = self._limits
        # Untrusted images go to fewer decoders than a user's own files.
        return read_image(source, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, formats=WEB_FORMATS)


def _check_address(source: object, number: int) -> str:
    if not isinstance(source, str):
        raise ValueError(f"Image {number} is {type(source).__name__}; a data:image/png;base64,... URL is needed.")
    return source.strip()
