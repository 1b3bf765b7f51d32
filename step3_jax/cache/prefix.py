"""Keys of whole pages: two pages have the same key if and only if they hold the keys and values of the same tokens.

A key is the SHA-256 of the parent page's key, the page's 64 token ids, and the images that have places in it, so that it
stands for the whole sequence up to the page's end. The first page's parent is a root that stands for the cache format and
the request's salt. Digests are never shortened: two prompts whose keys collide would read each other's cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pallas_kernels.storage import PAGE_SIZE


def root_key(cache_format: str, salt: str = "") -> bytes:
    """The parent of a sequence's first page.

    Args:
      cache_format: The other thing that the bytes of a page depend on: its storage.
      salt: Requests with different salts share no pages.
    """
    return _digest(b"root", cache_format.encode(), salt.encode("utf-8", "surrogatepass"))


def image_marks(places: Sequence[int], images: Sequence[tuple[bytes, int]]) -> dict[int, bytes]:
    """What goes into the keys of pages with image places besides token ids.

    Args:
      places: Positions of image features in the prompt, in order.
      images: For each image, in the order of the places, the digest of its pixels and geometry, and its number of places.

    Returns:
      By page number: which part of which image is where in the page.

    Raises:
      ValueError: If the images do not fill the places.
    """
    if sum(count for _, count in images) != len(places):
        raise ValueError(
            f"{len(places)} image places are given for images of {[count for _, count in images]} features"
        )
    marks: dict[int, bytes] = {}
    first = 0
    for digest, count in images:
        pages: dict[int, list[int]] = {}
        for number, place in enumerate(places[first : first + count]):
            # The first feature in a page and its place; the token ids say where the others are.
            pages.setdefault(place // PAGE_SIZE, [number, place % PAGE_SIZE])
        for page, start in pages.items():
            marks[page] = marks.get(page, b"") + digest + np.asarray(start, "<i8").tobytes()
        first += count
    return marks


def extend_keys(keys: list[bytes], token_ids: Sequence[int], root: bytes, marks: Mapping[int, bytes]) -> None:
    """Appends the keys of whole pages that `keys` lacks.

    Args:
      keys: Keys of the sequence's first pages.
      token_ids: The sequence's tokens; those after its last whole page have no key yet.
      root: See `root_key`.
      marks: See `image_marks`.
    """
    for page in range(len(keys), len(token_ids) // PAGE_SIZE):
        ids = np.asarray(token_ids[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], "<i4").tobytes()
        keys.append(_digest(keys[-1] if keys else root, ids, marks.get(page, b"")))


def _digest(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        # With its length, so that no two lists of parts give the same bytes.
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
