"""What the tiny Step3's pictures show, and which of it is kept out of training.

Held out: one artist, five fonts, 300 numbers and 297 handwritten digits. The split has a seed of its own, so
that pools of another seed never train on what the tests show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny.canvas import Size, paint_digit, paint_drawing, paint_number
from tools.tiny.drawings import TEST_ARTIST, TRAIN_ARTISTS

KINDS = ("drawings", "numbers", "handwriting")

HELD_OUT_FONTS = (
    "DejaVuSerif.ttf",
    "FreeSansBold.ttf",
    "FreeSerifItalic.ttf",
    "LiberationMono-Regular.ttf",
    "LiberationSansNarrow-Regular.ttf",
)
HELD_OUT_NUMBERS = {2: 20, 3: 80, 4: 200}  # how many of each number of digits no training picture shows
HELD_OUT_DIGITS = 297
LENGTH_SHARES = (0.15, 0.25, 0.30, 0.30)  # of numbers with one to four digits
SPLIT_SEED = 20  # fixes what is held out, apart from the seed of the pools


@dataclass(frozen=True)
class Sources:
    """What pictures are painted from. `drawings[thing]` holds the training artists' drawings alone."""

    drawings: list[list[Image.Image]]
    test_drawings: list[Image.Image]
    fonts: list[str]
    test_fonts: list[str]
    digits: np.ndarray
    digit_labels: np.ndarray
    test_digits: np.ndarray
    test_digit_labels: np.ndarray

    def paint(self, kind: str, item: int, size: Size, rng: np.random.Generator) -> Image.Image:
        """Paints one training picture: of a thing, a number, or the handwritten digit at an index."""
        if kind == "drawings":
            drawings = self.drawings[item]
            return paint_drawing(drawings[rng.integers(len(drawings))], size, 1.0, rng)
        if kind == "numbers":
            return paint_number(item, self.fonts[rng.integers(len(self.fonts))], size, 1.0, rng)
        return paint_digit(self.digits[item], size, 1.0, rng)


@lru_cache(maxsize=1)
def load_sources(data: Path) -> Sources:
    """Loads drawings, fonts and digits, split into training and test; once per process.

    Raises:
      ValueError: If a step before this one has not been run.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - of the extra `tiny`: tests use this module without it

    if not (data / "drawings.npz").exists():
        raise ValueError(f"no drawings.npz in {data}; run `python -m tools.tiny.drawings` with the same --data")
    with np.load(data / "drawings.npz") as archive:
        rgba, thing, artist = archive["rgba"], archive["thing"], archive["artist"]
    fonts = sorted((data / "raw/deb/usr/share/fonts/truetype").rglob("*.ttf"))
    test_fonts = [str(path) for path in fonts if path.name in HELD_OUT_FONTS]
    if len(test_fonts) != len(HELD_OUT_FONTS):
        raise ValueError(f"fonts are missing below {data / 'raw/deb'}; run `python -m tools.tiny.fetch` first")
    drawings: list[list[Image.Image]] = [[] for _ in range(thing.max() + 1)]
    for pixels, index, hand in zip(rgba, thing, artist, strict=True):
        if hand in TRAIN_ARTISTS:
            drawings[index].append(Image.fromarray(pixels))
    digits, labels = load_digits(return_X_y=True)
    train, test = split_digits(labels)
    return Sources(
        drawings=drawings,
        test_drawings=[Image.fromarray(rgba[np.flatnonzero((thing == index) & (artist == TEST_ARTIST))[0]])
                       for index in range(len(drawings))],
        fonts=[str(path) for path in fonts if path.name not in HELD_OUT_FONTS],
        test_fonts=test_fonts,
        digits=digits[train].reshape(-1, 8, 8),
        digit_labels=labels[train],
        test_digits=digits[test].reshape(-1, 8, 8),
        test_digit_labels=labels[test],
    )  # fmt: skip


def split_digits(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted indices of the handwritten digits for training and test, digits in equal shares."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    everything = np.arange(len(labels))
    train, test = train_test_split(everything, test_size=HELD_OUT_DIGITS, random_state=SPLIT_SEED, stratify=labels)
    return np.sort(train), np.sort(test)


def held_out_numbers() -> np.ndarray:
    """Returns the int32 numbers, ascending, that no training picture shows."""
    rng = np.random.default_rng(SPLIT_SEED)
    parts = [
        rng.choice(np.arange(10 ** (length - 1), 10**length), count, replace=False)
        for length, count in HELD_OUT_NUMBERS.items()
    ]
    return np.sort(np.concatenate(parts)).astype(np.int32)


def choose_items(kind: str, count: int, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """Chooses what a pool shows: things and digits in equal shares, numbers by `LENGTH_SHARES`."""
    if kind != "numbers":
        choices = len(sources.drawings) if kind == "drawings" else len(sources.digits)
        return rng.permutation(np.arange(count, dtype=np.int32) % choices)
    lengths = rng.choice(4, count, p=LENGTH_SHARES)
    allowed = [np.setdiff1d(np.arange(10**n if n else 0, 10 ** (n + 1)), held_out_numbers()) for n in range(4)]
    return np.array([rng.choice(allowed[length]) for length in lengths], np.int32)
