"""Paints one training picture: a drawing, a number or a handwritten digit, on a random background.

Every painter takes the frame's size in pixels, so that the same code makes the 64x64 pictures and the larger
ones that are cut into windows. All randomness comes from the generator passed in.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Size = tuple[int, int]  # width, height in pixels
Colour = tuple[int, int, int]
Range = tuple[float, float]

WHITE: Colour = (255, 255, 255)
MIN_CONTRAST = 110  # difference of luma between ink and paper, of 255
MIN_DISTANCE = 70  # Euclidean distance in RGB between a drawing's mean colour and its paper


def luma(colour: Colour) -> float:
    """Returns the brightness of a colour as ITU-R BT.601 weighs it, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def pick_colour(rng: np.random.Generator, saturation: Range, value: Range) -> Colour:
    """Draws a colour of any hue with saturation and value from the given ranges (0 to 1)."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return round(red * 255), round(green * 255), round(blue * 255)


def pick_paper(rng: np.random.Generator) -> Colour:
    """Draws a background: often white or light, sometimes any colour."""
    kind = rng.random()
    if kind < 0.3:
        return WHITE
    if kind < 0.65:
        return pick_colour(rng, (0.0, 0.25), (0.85, 1.0))
    return pick_colour(rng, (0.0, 0.8), (0.1, 1.0))


def pick_ink_and_paper(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Draws two colours that a person can tell apart: mostly dark on light, a quarter light on dark."""
    while True:
        is_vivid = rng.random() < 0.6
        dark = pick_colour(rng, (0, 1), (0, 0.65)) if is_vivid else pick_colour(rng, (0, 0.2), (0, 0.3))
        light = WHITE if rng.random() < 0.35 else pick_colour(rng, (0.0, 0.45), (0.7, 1.0))
        if luma(light) - luma(dark) >= MIN_CONTRAST:
            return (dark, light) if rng.random() < 0.75 else (light, dark)


def paint_paper(size: Size, colour: Colour, spread: float, rng: np.random.Generator) -> Image.Image:
    """Paints a background: plain (half of the time), with a gradient, or with a soft texture.

    Args:
      size: The frame.
      colour: The colour that it varies around.
      spread: How far gradient and texture leave that colour, as a standard deviation of 255.
      rng: Source of randomness.

    Returns:
      An RGB picture.
    """
    kind = rng.random()
    if kind < 0.5:
        return Image.new("RGB", size, colour)
    if kind < 0.75:  # four corner colours, blended
        corners = np.array(colour) + rng.normal(0, spread, (2, 2, 3))
        method = Image.Resampling.BILINEAR
    else:
        cells = int(rng.integers(4, 13))
        corners = np.array(colour) + rng.normal(0, spread / 2, (cells, cells, 1 if rng.random() < 0.5 else 3))
        corners = np.broadcast_to(corners, (cells, cells, 3))
        method = Image.Resampling.BICUBIC
    return Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8)).resize(size, method)


def jitter(picture: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast and hue a little, and adds noise or blur to some pictures.

    Args:
      picture: An RGB picture.
      strength: 1 for training; less is milder.
      rng: Source of randomness.

    Returns:
      An RGB picture of the same size.
    """
    if rng.random() < 0.25 * strength:
        scale = max(1.0, min(picture.size) / 64)
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8) * scale))
    pixels = np.asarray(picture, np.float32)
    if rng.random() < 0.6:
        contrast, brightness = 1 + strength * rng.uniform(-0.2, 0.2, 2)
        pixels = ((pixels - 128) * contrast + 128) * brightness
    if rng.random() < 0.5:
        pixels = pixels @ hue_rotation(strength * rng.uniform(-12, 12)).T
    if rng.random() < 0.4:
        noise = rng.standard_normal(pixels.shape, np.float32)
        pixels = pixels + noise * np.float32(strength * rng.uniform(1, 9))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def hue_rotation(degrees: float) -> np.ndarray:
    """Returns the float32 [3, 3] matrix that turns hues and keeps luma (SVG 1.1, feColorMatrix hueRotate)."""
    weights = np.array([0.213, 0.715, 0.072])
    grey = np.tile(weights, (3, 1))
    sine = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    angle = np.deg2rad(degrees)
    return (grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * sine).astype(np.float32)


def mean_colour(drawing: Image.Image) -> np.ndarray:
    """Returns the float [3] mean colour of an RGBA drawing's opaque part."""
    pixels = np.asarray(drawing.resize((16, 16)), np.float32).reshape(-1, 4)
    return (pixels[:, :3] * pixels[:, 3:]).sum(0) / max(pixels[:, 3].sum(), 1.0)


def place_centred(drawing: Image.Image, side: int, fill: float = 0.92) -> Image.Image:
    """Centres an RGBA drawing on a white square, as RGB; `fill` is its share of the side."""
    inner = round(side * fill)
    picture = Image.new("RGB", (side, side), WHITE)
    scaled = drawing.resize((inner, inner), Image.Resampling.BICUBIC)
    picture.paste(scaled, ((side - inner) // 2, (side - inner) // 2), scaled)
    return picture


def paint_drawing(drawing: Image.Image, size: Size, strength: float, rng: np.random.Generator) -> Image.Image:
    """Puts a drawing, turned, scaled, shifted and perhaps mirrored, on a random background.

    Args:
      drawing: RGBA square.
      size: The frame; the drawing takes 55% to 100% of its shorter side.
      strength: 1 for training; less means milder turns, scales and colours.
      rng: Source of randomness.

    Returns:
      An RGB picture.
    """
    mean = mean_colour(drawing)
    paper = pick_paper(rng)
    while np.linalg.norm(mean - paper) < MIN_DISTANCE:
        paper = pick_paper(rng)
    picture = paint_paper(size, paper, 30 * strength, rng)
    side = max(round(min(size) * rng.uniform(1 - 0.45 * strength, 1.0)), 8)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scaled = drawing.resize((side, side), Image.Resampling.BICUBIC)
    turned = scaled.rotate(strength * rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    # The upright drawing may leave the frame by up to 4% of its side; what a turn adds is mostly empty.
    slack = [(frame - side) / 2 + 0.04 * side for frame in size]
    left, top = (
        round((frame - part) / 2 + rng.uniform(-room, room))
        for frame, part, room in zip(size, turned.size, slack, strict=True)
    )
    picture.paste(turned, (left, top), turned)
    return jitter(picture, strength, rng)


@lru_cache(maxsize=4096)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Opens a font at a size in pixels, once per process."""
    return ImageFont.truetype(path, size)


def paint_number(number: int, font: str, size: Size, strength: float, rng: np.random.Generator) -> Image.Image:
    """Writes a whole number in a font, in two contrasting colours, slightly turned and shifted.

    Args:
      number: Zero or more.
      font: Path of a TrueType font.
      size: The frame. Three or four digits take 55% to 95% of its width, fewer may take less.
      strength: 1 for training; less is milder.
      rng: Source of randomness.

    Returns:
      An RGB picture.
    """
    text = str(number)
    ink, paper = pick_ink_and_paper(rng)
    fill_from = {1: 0.15, 2: 0.35}.get(len(text), 0.58)
    reference = load_font(font, 64).getbbox(text)
    width, height = reference[2] - reference[0], reference[3] - reference[1]
    room = min(rng.uniform(fill_from, 0.95) * size[0] / width, rng.uniform(0.6, 0.92) * size[1] / height)
    room = max(room, 0.3 * size[1] / height if len(text) == 1 else 0)
    face = load_font(font, max(round(64 * room), 8))
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=face)
    mask = mask.rotate(strength * rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())
    shrink = min(0.97 * size[0] / mask.width, 0.97 * size[1] / mask.height)
    if shrink < 1:
        inside = (max(int(mask.width * shrink), 1), max(int(mask.height * shrink), 1))
        mask = mask.resize(inside, Image.Resampling.BICUBIC)
    return paint_mask(mask, ink, paper, size, strength, rng)


def paint_mask(
    mask: Image.Image, ink: Colour, paper: Colour, size: Size, strength: float, rng: np.random.Generator
) -> Image.Image:
    """Stamps a grey mask, which must fit the frame, in `ink` at a random place on a `paper` background."""
    picture = paint_paper(size, paper, 14 * strength, rng)
    left = int(rng.integers(0, size[0] - mask.width + 1))
    top = int(rng.integers(0, size[1] - mask.height + 1))
    picture.paste(ink, (left, top, left + mask.width, top + mask.height), mask)
    return jitter(picture, strength, rng)


def digit_mask(digit: np.ndarray, side: int) -> Image.Image:
    """Scales an 8x8 grey digit (0 to 16) up to `side` x `side` pixels, with an empty rim one cell wide."""
    cells = np.pad(np.clip(digit / 16.0, 0, 1) * 255, 1).astype(np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


def paint_digit(digit: np.ndarray, size: Size, strength: float, rng: np.random.Generator) -> Image.Image:
    """Stamps a real handwritten digit, turned, sheared and with strokes of random firmness.

    Args:
      digit: [8, 8] grey values, 0 (paper) to 16 (ink).
      size: The frame; the digit takes 47% to 94% of its shorter side.
      strength: 1 for training; less is milder.
      rng: Source of randomness.

    Returns:
      An RGB picture.
    """
    ink, paper = pick_ink_and_paper(rng)
    side = round(min(size) * rng.uniform(0.47, 0.94))
    mask = digit_mask(digit, side)
    angle, shear = np.deg2rad(strength * rng.uniform(-12, 12)), strength * rng.uniform(-0.15, 0.15)
    cosine, sine, middle = np.cos(angle), np.sin(angle), side / 2
    across, down = (cosine, sine + shear), (-sine, cosine)
    coefficients = (
        *across,
        middle - (across[0] + across[1]) * middle,
        *down,
        middle - (down[0] + down[1]) * middle,
    )
    mask = mask.transform(mask.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    firmness, threshold = 1 + strength * rng.uniform(0, 2), rng.uniform(0.1, 0.25)
    strokes = np.clip((np.asarray(mask, np.float32) / 255 - threshold) * firmness / (1 - threshold), 0, 1)
    return paint_mask(Image.fromarray((strokes * 255).astype(np.uint8)), ink, paper, size, strength, rng)
