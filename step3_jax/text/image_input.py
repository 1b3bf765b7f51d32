"""Opens a picture that a user names: a path, bytes, a data URL or a Pillow picture."""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 64 * 2**20

# Only decoders of pictures that people send: Pillow's list also has formats that start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "MPO")
_DATA_URL = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    allow_paths: bool = True,
) -> Image.Image:
    """Opens a picture as 8-bit RGB.

    The rotation in the EXIF data is applied. Transparency is dropped, not blended, so hidden colours show:
    the released processor gets its pictures so. Grey of 16 bits is scaled to 8. Of an animation the first
    frame is taken.

    Args:
      source: A path, the bytes of a file, a `data:` URL with base64, or a Pillow picture.
      max_pixels: Largest width times height, read from the header before anything is decoded. Pillow's own
        limit, of about 179 million pixels, holds as well.
      max_bytes: Largest file, in bytes.
      allow_paths: Whether a string may name a file on this machine; a server says no.

    Returns:
      A picture of mode RGB, fully decoded, that shares nothing with the source.

    Raises:
      ValueError: If the source is a web address, too large, or no picture that can be read.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels)
    data = _read(source, name, max_bytes, allow_paths)
    if len(data) > max_bytes:
        raise ValueError(f"{name} has {len(data):,} bytes; at most {max_bytes:,} are allowed.")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever a malformed header leads them to.
        raise ValueError(
            f"{name} is no picture that can be read; use one of {', '.join(_FORMATS)}. ({error})"
        ) from error
    with picture:
        return _decode(picture, name, max_pixels)


def _name(source: ImageSource) -> str:
    """How messages call the source, short enough for a log."""
    if isinstance(source, bytes):
        return f"The image of {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return f"The {source.mode} picture"
    text = str(source)
    # The middle is left out: a data URL is known by its start, a file by its end.
    return f"Image {text[:40] + '...' + text[-40:] if len(text) > 83 else text!r}"


def _read(source: str | Path | bytes, name: str, max_bytes: int, allow_paths: bool) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            # Base64 takes four letters for three bytes, percent escapes three for one.
            if len(source) > 3 * max_bytes + 1024:
                raise ValueError(f"{name} has {len(source):,} letters; at most {max_bytes:,} bytes are allowed.")
            return _decode_data_url(source, name)
        scheme = re.match(r"([a-z][a-z0-9+.-]*)://", source, re.IGNORECASE)
        if scheme:
            raise ValueError(
                f"{name} is a {scheme[1]} address, and this program fetches nothing. Download the picture "
                "and give its path, its bytes, or a data:image/...;base64,... URL."
            )
    elif not isinstance(source, Path):
        raise ValueError(
            f"An image source is a path, bytes, a data URL or a Pillow picture, not {type(source).__name__}."
        )
    if not allow_paths:
        raise ValueError(f"{name} is not accepted here; give a data:image/...;base64,... URL.")
    path = Path(source)
    try:
        # Reading a device or a pipe may never end.
        size = path.stat().st_size if path.is_file() else -1
        data = path.read_bytes() if 0 <= size <= max_bytes else b""
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
    if size < 0:
        raise ValueError(f"{name} cannot be read: there is no such file.")
    if size > max_bytes:
        raise ValueError(f"{name} has {size:,} bytes; at most {max_bytes:,} are allowed.")
    return data


def _decode_data_url(url: str, name: str) -> bytes:
    header = _DATA_URL.match(url)
    if header is None:
        raise ValueError(f"{name} is no data URL; the form is data:image/png;base64,....")
    payload = url[header.end() :]
    if "base64" not in header["parameters"].lower().split(";"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} holds base64 that cannot be decoded: {error}.") from error


def _decode(picture: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are allowed."
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # As above: a file cut off in the middle ends in many kinds of errors.
        raise ValueError(f"{name} is damaged or of an unknown kind: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow would clip these at 255, which makes nearly every 16-bit picture white.
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values must be whole numbers of at most 16 bits; save it with 8 bits a channel.")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save it with 8 bits a channel.")
    if picture.mode == "P":
        # By way of RGBA, as Pillow warns of palettes with transparency otherwise; the colours are the same.
        picture = picture.convert("RGBA")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
