"""One image for Step3: how it is cut, what pixels the model sees, and which tokens it takes in a prompt.

An image becomes one square view of the whole and, if it is large or long, a grid of square windows cut
from a copy whose sides are multiples of the window. In the prompt the windows come first, row by row, and
then the view. The rules are the released processor's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.resize import resize_bilinear

# The settings are part of this module's interface.
__all__ = ["ImagePlan", "ImageSettings", "ImageTokenIds", "ProcessedImage", "expand_image_tokens", "plan", "process"]

# A side under _THIN_SIDE in an image longer than _THIN_RATIO to one is padded to a square before anything
# else.
_THIN_SIDE = 32
_THIN_RATIO = 4.0
# That square is made at full size, so a line of 60000 x 1 pixels would need gigabytes.
_MAX_PADDED_SIDE = 8192


@dataclass(frozen=True)
class ImagePlan:
    """How one image is cut. All sizes are (width, height) in pixels.

    Attributes:
      padded: Size after padding a thin image to a square.
      limited: Size after the limit on the long side; the view is made from this.
      window: Side of a window in the crop image, before its resize to `window_size`; 0 for no windows.
      crop: Size of the image from which windows are cut, None without windows. A side may be shorter than
        the
        window: what lies outside is black.
      windows: Each window as (x, y, width, height) in the crop image, row by row.
      newline_mask: For each window, whether a newline token follows it: at row ends, but never after the
        last.
      num_tokens: Tokens in the prompt, including delimiters and newlines.
      image_token_len: Tokens of the view between its delimiters.
      patch_token_len: Tokens of a window between its delimiters.
    """

    padded: tuple[int, int]
    limited: tuple[int, int]
    window: int
    crop: tuple[int, int] | None
    windows: tuple[tuple[int, int, int, int], ...]
    newline_mask: tuple[bool, ...]
    num_tokens: int
    image_token_len: int
    patch_token_len: int

    @property
    def num_patches(self) -> int:
        """Number of windows (the release calls them patches)."""
        return len(self.windows)

    @property
    def num_newlines(self) -> int:
        """Number of newline tokens."""
        return sum(self.newline_mask)

    def token_ids(self, tokens: ImageTokenIds) -> list[int]:
        """The `num_tokens` ids of this image in a prompt: windows row by row, then the view."""
        ids: list[int] = []
        for is_row_end in self.newline_mask:
            ids += [tokens.patch_start, *[tokens.im_patch] * self.patch_token_len, tokens.patch_end]
            ids += [tokens.patch_newline] * is_row_end
        return [*ids, tokens.im_start, *[tokens.im_patch] * self.image_token_len, tokens.im_end]


@dataclass(frozen=True)
class ImageTokenIds:
    """Ids of the tokens that represent an image, from the checkpoint's own tokenizer."""

    im_patch: int
    im_start: int
    im_end: int
    patch_start: int
    patch_end: int
    patch_newline: int


@dataclass(frozen=True)
class ProcessedImage:
    """The vision tower's input for one image.

    Attributes:
      pixel_values: The view, float32 [3, image_size, image_size].
      patch_pixel_values: The windows, float32 [num_patches, 3, window_size, window_size].
      plan: How the image was cut.
    """

    pixel_values: np.ndarray
    patch_pixel_values: np.ndarray
    plan: ImagePlan

    @property
    def num_features(self) -> int:
        """Rows of features that it needs: one for each of its `<im_patch>` places."""
        return self.plan.num_patches * self.plan.patch_token_len + self.plan.image_token_len

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of pixels and geometry: two images with the same digest have the same features."""
        found = hashlib.sha256(repr((self.pixel_values.shape, self.patch_pixel_values.shape, self.plan)).encode())
        for pixels in (self.pixel_values, self.patch_pixel_values):
            found.update(np.ascontiguousarray(pixels, np.float32).tobytes())
        return found.digest()


def plan(width: int, height: int, settings: ImageSettings | None = None) -> ImagePlan:
    """Works out how an image of this size is cut, without its pixels.

    Args:
      width: Width in pixels.
      height: Height in pixels.
      settings: Constants; None for the released ones.

    Returns:
      The plan.

    Raises:
      ValueError: If a side is not positive, or the shape is so extreme that a side would vanish or the
        limits on windows, tokens or padding would be exceeded.
    """
    settings = settings or ImageSettings()
    if width < 1 or height < 1:
        raise ValueError(f"An image of {width}x{height} pixels has no area; both sides must be at least 1.")
    advice = "Crop the image or scale it to a less extreme shape."
    padded = limited = (width, height)
    if min(padded) < _THIN_SIDE and not 1 / _THIN_RATIO <= width / height <= _THIN_RATIO:
        padded = limited = (max(padded), max(padded))
        if max(padded) > _MAX_PADDED_SIDE:
            raise ValueError(
                f"An image of {width}x{height} pixels would be padded to a square with sides of {max(padded)} "
                f"pixels; at most {_MAX_PADDED_SIDE} are allowed. {advice}"
            )
    if max(padded) > settings.max_side:
        factor = settings.max_side / max(padded)
        limited = (int(padded[0] * factor), int(padded[1] * factor))
        if min(limited) < 1:
            raise ValueError(
                f"An image of {width}x{height} pixels would have no area after its long side is made "
                f"{settings.max_side} pixels. {advice}"
            )

    window = _window_side(*limited, settings)
    crop, columns, rows = None, 0, 0
    if window:
        crop = (_crop_side(limited[0], window, settings), _crop_side(limited[1], window, settings))
        columns, rows = -(-crop[0] // window), -(-crop[1] // window)
    num_windows, num_newlines = columns * rows, max(rows - 1, 0)
    num_tokens = num_windows * (settings.patch_token_len + 2) + num_newlines + settings.image_token_len + 2
    for amount, limit, noun in (
        (num_windows, settings.max_windows, "windows"),
        (num_tokens, settings.max_tokens, "tokens"),
    ):
        if amount > limit:
            raise ValueError(
                f"An image of {width}x{height} pixels needs {amount} {noun}; at most {limit} are allowed. {advice}"
            )
    return ImagePlan(
        padded=padded,
        limited=limited,
        window=window,
        crop=crop,
        windows=tuple((x * window, y * window, window, window) for y in range(rows) for x in range(columns)),
        newline_mask=tuple(x == columns - 1 and y < rows - 1 for y in range(rows) for x in range(columns)),
        num_tokens=num_tokens,
        image_token_len=settings.image_token_len,
        patch_token_len=settings.patch_token_len,
    )


def _window_side(width: int, height: int, settings: ImageSettings) -> int:
    long, short = max(width, height), min(width, height)
    # A side of exactly `image_size` is small, as in the vendor's processor (some later servers use `<`).
    if long <= settings.image_size:
        return short if long / short > settings.small_ratio else 0
    return min(short, settings.window_size) if long / short > settings.wide_ratio else settings.window_size


def _crop_side(side: int, window: int, settings: ImageSettings) -> int:
    ratio = side / window
    if ratio < 1:
        return side
    return window * (int(ratio) + (ratio - side // window > settings.round_up))


def process(image: Image.Image, settings: ImageSettings | None = None) -> ProcessedImage:
    """Makes the pixels that the model sees from one image.

    Padding, the limit on the long side and the crop image are Pillow's 8-bit operations, as in the release;
    the last resize, to the sizes of the view and the windows, is in float32 without rounding.

    Args:
      image: An image in mode RGB (`image_input.open_image` returns one).
      settings: Constants; None for the released ones.

    Returns:
      View, windows and plan.

    Raises:
      ValueError: If the image is not RGB, or `plan` refuses its size.
    """
    settings = settings or ImageSettings()
    if image.mode != "RGB":
        raise ValueError(f"The image has mode {image.mode}, not RGB; open it with open_image().")
    cut = plan(image.width, image.height, settings)
    if cut.padded != image.size:
        square = Image.new("RGB", cut.padded)
        square.paste(image, (0, 0))
        image = square
    if cut.limited != image.size:
        image = image.resize(cut.limited, Image.Resampling.BILINEAR)
    view = _to_pixels(image, settings.image_size, settings)

    windows = np.empty((cut.num_patches, 3, settings.window_size, settings.window_size), np.float32)
    if cut.crop is not None:
        crop = image if cut.crop == image.size else image.resize(cut.crop, Image.Resampling.BILINEAR)
        for index, (x, y, width, height) in enumerate(cut.windows):
            # Where the window reaches past the image, Pillow fills it with black.
            windows[index] = _to_pixels(crop.crop((x, y, x + width, y + height)), settings.window_size, settings)
    return ProcessedImage(view, windows, cut)


def _to_pixels(image: Image.Image, size: int, settings: ImageSettings) -> np.ndarray:
    """Normalised float32 [3, size, size]."""
    # The release normalises first. The resize's weights sum to one, so the order affects only the last
    # bits, and this one works on bytes until the image is small.
    pixels = resize_bilinear(np.asarray(image), size, size)
    mean, std = np.asarray(settings.image_mean, np.float32), np.asarray(settings.image_std, np.float32)
    return np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1))


def expand_image_tokens(ids: Sequence[int], plans: Sequence[ImagePlan], tokens: ImageTokenIds) -> list[int]:
    """Expands each single `<im_patch>` of a prompt to all the tokens of its image.

    Args:
      ids: Token ids of the prompt, with one `<im_patch>` per image.
      plans: One plan per image, in the order of the prompt.
      tokens: Ids of the image tokens.

    Returns:
      The ids; features go to the `<im_patch>` positions in order, each image's windows before its view.

    Raises:
      ValueError: If the number of `<im_patch>` is not the number of images.
    """
    num_places = sum(token == tokens.im_patch for token in ids)
    if num_places != len(plans):
        raise ValueError(
            f"The prompt has {num_places} <im_patch> token(s) for {len(plans)} image(s); "
            "write exactly one <im_patch> for each image."
        )
    remaining = iter(plans)
    expanded: list[int] = []
    for token in ids:
        if token == tokens.im_patch:
            expanded += next(remaining).token_ids(tokens)
        else:
            expanded.append(token)
    return expanded
