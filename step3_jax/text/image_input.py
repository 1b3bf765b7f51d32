"""Opens an image given by a user: a path, bytes, a data URL or a Pillow image."""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, ImageOps, features

from step3_jax.stored_file import START_BYTES, describe_stand_in

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 64 * 2**20

# Only decoders of images that people send: Pillow's list also has formats that start other programs. JPEG also opens
# files in which cameras save several images (MPO).
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "ICO",
    *(("AVIF",) if "avif" in features.get_supported() else ()),
)
# The formats that OpenAI's API takes, and so every service with its API.
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# The first bytes of files that are often sent as images but cannot be read.
_OTHER_KINDS = (
    (re.compile(rb".{4}ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL), "a HEIC image: convert it to JPEG"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "an AVIF image, which the installed Pillow has no decoder for"),
    (re.compile(rb"%PDF-"), "a PDF document: convert its pages to PNG"),
    (re.compile(rb"(<\?xml.{,200})?<svg", re.DOTALL | re.IGNORECASE), "an SVG drawing: convert it to PNG"),
)
_DATA_URL = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Chunks that are not critical (those start with a capital) but still change the pixels: transparency, rotation, and the
# marks of an animation.
_PNG_KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# The number in a 64 MiB file of one-kilobyte chunks.
_MAX_CHUNKS = 2**16


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    allow_paths: bool = True,
) -> Image.Image:
    """Opens an image as 8-bit RGB.

    The rotation in the EXIF data is applied. Transparency is blended with white, as in vLLM. Grey of more
    than 8 bits is scaled to 8: values up to 255 count as 8 bits, larger ones as 16, and fractions up to 1 as parts of
    white. The first frame of an animation is used.

    Args:
      source: A path, a `file:` address of this machine, the bytes of a file, a `data:` URL, or a Pillow image.
        Base64 may lack its padding, have line breaks, and use the URL alphabet.
      max_pixels: Largest width times height, read from the header before anything is decoded. Pillow's own
        limit of about 179 million pixels also applies.
      max_bytes: Largest file, in bytes.
      allow_paths: Whether a string may name a file on this machine; False on a server.

    Returns:
      An image of mode RGB, fully decoded, that shares nothing with the source.

    Raises:
      ValueError: If the source is a web address, too large, or not an image that can be read.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_size(source, name, max_pixels)
        return _decode(source, name)
    data = _read(source, name, max_bytes, allow_paths)
    with _open_header(data, name, FORMATS, max_pixels) as picture:
        return _decode(picture, name)


def read_image(
    source: str | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    formats: tuple[str, ...] = FORMATS,
) -> bytes:
    """Reads the file of an untrusted image, and checks its header; nothing is decoded.

    Args:
      source: A `data:` URL, or the bytes of a file. No paths.
      max_pixels: As in `open_image`.
      max_bytes: As in `open_image`.
      formats: The allowed ones of `FORMATS`.

    Returns:
      Bytes for `open_image`, which may still find them damaged.

    Raises:
      ValueError: As `open_image`, and for formats that are not allowed.
    """
    name = _name(source)
    data = _read(source, name, max_bytes, allow_paths=False)
    _open_header(data, name, formats, max_pixels).close()
    return data


def _open_header(data: bytes, name: str, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """The image, of which Pillow has read only the header."""
    if data.startswith(_PNG_START):
        data = _without_side_data(data, name)
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise all kinds of errors on a malformed header.
        what = _describe_other(data)
        reason = f"it is {what}" if what else str(error)
        raise ValueError(
            f"{name} is not an image that can be read; use one of {', '.join(formats)}. ({reason})"
        ) from error
    _check_size(picture, name, max_pixels)
    return picture


def _name(source: ImageSource) -> str:
    """The source's name in messages, short enough for a log."""
    if isinstance(source, bytes):
        return f"The image of {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return f"The {source.mode} image"
    text = str(source)
    # Omit the middle: a data URL is recognised by its start, a file by its end.
    return f"Image {text[:40] + '...' + text[-40:] if len(text) > 83 else text!r}"


def _read(source: str | Path | bytes, name: str, max_bytes: int, allow_paths: bool) -> bytes:
    data = source if isinstance(source, bytes) else _read_named(source, name, max_bytes, allow_paths)
    if len(data) > max_bytes:
        raise ValueError(f"{name} has {len(data):,} bytes; at most {max_bytes:,} are allowed.")
    return data


def _read_named(source: str | Path, name: str, max_bytes: int, allow_paths: bool) -> bytes:
    if isinstance(source, str):
        address = source.strip()
        if address[:5].lower() == "data:":
            # Base64 takes four letters for three bytes, percent escapes three for one.
            if len(address) > 3 * max_bytes + 1024:
                raise ValueError(f"{name} has {len(address):,} letters; at most {max_bytes:,} bytes are allowed.")
            return _decode_data_url(address, name)
        scheme = re.match(r"([a-z][a-z0-9+.-]*)://", address, re.IGNORECASE)
        if address[:6].lower() == "file:/" and allow_paths:
            source = _path_of(address, name)
        elif scheme and scheme[1].lower() != "file":
            raise ValueError(
                f"{name} is a {scheme[1]} address, and this program fetches nothing. Download the image "
                "and give its path, its bytes, or a data:image/...;base64,... URL."
            )
    elif not isinstance(source, Path):
        raise ValueError(
            f"An image source is a path, bytes, a data URL or a Pillow image, not {type(source).__name__}."
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
        raise ValueError(f"{name} is not a data URL; the form is data:image/png;base64,....")
    payload = unquote_to_bytes(url[header.end() :])
    if "base64" not in header["parameters"].lower().split(";"):
        return payload
    # As in browsers: whitespace and padding are ignored, and the alphabet may be the one for URLs.
    letters = b"".join(payload.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} holds base64 that cannot be decoded: {error}.") from error


def _path_of(address: str, name: str) -> str:
    """The path that a `file:` address of this machine names."""
    parts = urlsplit(address)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"{name} is a file of the machine {parts.netloc!r}; only files of this one can be read.")
    return unquote(parts.path)


def _describe_other(data: bytes) -> str | None:
    start = data[:START_BYTES]
    return describe_stand_in(start) or next((what for begin, what in _OTHER_KINDS if begin.match(start.lstrip())), None)


def _without_side_data(data: bytes, name: str) -> bytes:
    """A PNG file without chunks irrelevant to its pixels: profiles, and texts except those that may give its orientation.

    Pillow refuses files with large ones, and is slow with very many.
    """
    kept, position, num_chunks = [_PNG_START], len(_PNG_START), 0
    while position + 12 <= len(data):
        num_chunks += 1
        if num_chunks > _MAX_CHUNKS:
            raise ValueError(f"{name} has more than {_MAX_CHUNKS:,} PNG chunks; save it again.")
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 100].lower()
        is_of_use = kind[:1].isupper() or kind in _PNG_KEPT
        if kind in _PNG_TEXTS:
            is_of_use = content.startswith((b"raw profile type exif", b"xml:com.adobe.xmp"))
        if is_of_use:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def _check_size(picture: Image.Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are allowed."
        )


def _decode(picture: Image.Image, name: str) -> Image.Image:
    try:
        return _to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # As above: a truncated file causes all kinds of errors.
        raise ValueError(f"{name} is damaged or of an unknown kind: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        grey = _to_bytes(values)
        if isinstance(picture.info.get("transparency"), int):
            grey = np.where(values == picture.info["transparency"], np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        # "La" cannot be converted to RGBA directly.
        clear = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values of an unknown range as 8 bits: Pillow would clip them at 255, or make them all black."""
    if not np.isfinite(values).all():
        raise ValueError("grey values must be finite; save it with 8 bits per channel.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"grey values must be from 0 to 255, or to 65535 with 16 bits, but these are from {low:g} to {high:g}; save "
            "it with 8 bits per channel."
        )
    if values.dtype.kind == "f":
        scale = 255 if high <= 1 else 1 if high <= 255 else 255 / 65535
        return np.rint(values * scale).astype(np.uint8)
    return (values if high <= 255 else values >> 8).astype(np.uint8)
