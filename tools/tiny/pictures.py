"""Makes the picture pools that the tiny Step3 trains on, and the held-out pictures that it is judged by.

Pools are plain `.npy` arrays, to be memory-mapped; all pixels are uint8 RGB. They follow from one seed,
whatever the number of worker processes.

    python -m tools.tiny.pictures [--data DIR] [--seed N] [--fraction F] [--force]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from step3_jax.text.images import ImageSettings, plan
from tools.tiny.canvas import Size, digit_mask, paint_drawing, paint_number, place_centred
from tools.tiny.drawings import TEST_ARTIST
from tools.tiny.fetch import DEFAULT_DATA, say, write_json
from tools.tiny.sources import (
    HELD_OUT_FONTS,
    KINDS,
    SPLIT_SEED,
    choose_items,
    held_out_numbers,
    load_sources,
    split_digits,
)

POOL_SIZES = {"drawings": 60_000, "numbers": 90_000, "handwriting": 30_000}
LARGE_SHARES = (0.5, 0.4, 0.1)  # of the kinds above, in the pool of larger pictures
LARGE_SIZE = 30_000
CHUNK = 500  # pictures per unit of work
WORKERS = 2

IMAGE_SIDE, WINDOW_SIDE, MAX_WINDOWS = 64, 48, 4
# The released rule for cutting a picture into windows, with the tiny model's constants.
SETTINGS = ImageSettings(image_size=IMAGE_SIDE, window_size=WINDOW_SIDE, max_side=96)


def choose_size(kind: str, item: int, rng: np.random.Generator) -> Size:
    """Chooses a larger picture's size: 80 to 400 pixels, nearly square; half of the long numbers are wide."""
    side = round(float(np.exp(rng.uniform(np.log(80), np.log(400)))))
    if kind == "numbers" and item > 99 and rng.random() < 0.5:
        return side, round(side / rng.uniform(1.6, 3.5))
    if rng.random() < 0.3:  # photographs are seldom square
        return side, round(side * rng.uniform(0.75, 1.0))
    return side, side


def cut(picture: Image.Image) -> tuple[Image.Image, list[Image.Image]]:
    """Cuts a picture as the released preprocessing does, with the tiny model's constants.

    Returns:
      The whole view at 64x64 and the windows, row by row, at 48x48; no windows for a small picture.
    """
    how = plan(*picture.size, SETTINGS)
    if how.limited != picture.size:
        picture = picture.resize(how.limited, Image.Resampling.BILINEAR)
    windows = []
    if how.crop is not None:
        crop = picture.resize(how.crop, Image.Resampling.BILINEAR)
        for left, top, width, height in how.windows:
            part = crop.crop((left, top, left + width, top + height))  # black beyond the edge, as released
            windows.append(part.resize((WINDOW_SIDE, WINDOW_SIDE), Image.Resampling.BILINEAR))
    return picture.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR), windows


def paint_chunk(data: Path, kind: str, items: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Paints uint8 [len(items), 64, 64, 3] pictures of one kind."""
    sources, rng = load_sources(data), np.random.default_rng(seed)
    size = (IMAGE_SIDE, IMAGE_SIDE)
    return np.stack([np.asarray(sources.paint(kind, int(item), size, rng)) for item in items])


def paint_large_chunk(
    data: Path, kinds: np.ndarray, items: np.ndarray, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paints larger pictures and cuts them.

    Returns:
      Views uint8 [n, 64, 64, 3], windows uint8 [n, 4, 48, 48, 3] (unused: zeros), window counts int32 [n].
    """
    sources, rng = load_sources(data), np.random.default_rng(seed)
    views = np.zeros((len(items), IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    windows = np.zeros((len(items), MAX_WINDOWS, WINDOW_SIDE, WINDOW_SIDE, 3), np.uint8)
    counts = np.zeros(len(items), np.int32)
    for index, (kind, item) in enumerate(zip(kinds, items, strict=True)):
        while not 0 < counts[index] <= MAX_WINDOWS:
            size = choose_size(KINDS[kind], int(item), rng)
            view, parts = cut(sources.paint(KINDS[kind], int(item), size, rng))
            counts[index] = len(parts)
        views[index] = np.asarray(view)
        windows[index, : len(parts)] = [np.asarray(part) for part in parts]
    return views, windows, counts


def save(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.stem}.tmp.npy")
    np.save(temporary, array)
    temporary.replace(path)


def chunks(count: int) -> Iterator[slice]:
    """Yields the slices that divide a pool into units of work."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def build_pool(data: Path, kind: str, size: int, seed: int, pool: ProcessPoolExecutor) -> None:
    """Writes `pool-KIND-pixels.npy` [size, 64, 64, 3] and `pool-KIND-label.npy` int32 [size]."""
    sources, number = load_sources(data), KINDS.index(kind)
    items = choose_items(kind, size, sources, np.random.default_rng((seed, number)))
    parts = [
        pool.submit(paint_chunk, data, kind, items[part], (seed, number, index))
        for index, part in enumerate(chunks(len(items)))
    ]
    save(data / f"pool-{kind}-pixels.npy", np.concatenate([part.result() for part in parts]))
    labels = sources.digit_labels[items] if kind == "handwriting" else items
    save(data / f"pool-{kind}-label.npy", labels.astype(np.int32))  # last: it marks the pool as whole
    say(f"pool of {kind}: {len(items)} pictures")


def build_large_pool(data: Path, size: int, seed: int, pool: ProcessPoolExecutor) -> None:
    """Writes `pool-large-{view,windows,count,kind,label}.npy`, about `size` pictures."""
    sources, rng = load_sources(data), np.random.default_rng((seed, len(KINDS)))
    shares = [round(size * share) for share in LARGE_SHARES]
    kinds = rng.permutation(np.repeat(np.arange(len(KINDS), dtype=np.int32), shares))
    items = np.zeros(len(kinds), np.int32)
    for number, kind in enumerate(KINDS):
        items[kinds == number] = choose_items(kind, shares[number], sources, rng)
    parts = [
        pool.submit(paint_large_chunk, data, kinds[part], items[part], (seed, len(KINDS), index))
        for index, part in enumerate(chunks(len(items)))
    ]
    arrays = zip(*(part.result() for part in parts), strict=True)
    for name, array in zip(("view", "windows", "count"), arrays, strict=True):
        save(data / f"pool-large-{name}.npy", np.concatenate(array))
    is_digit = kinds == KINDS.index("handwriting")
    labels = np.where(is_digit, sources.digit_labels[np.where(is_digit, items, 0)], items)
    save(data / "pool-large-kind.npy", kinds)
    save(data / "pool-large-label.npy", labels.astype(np.int32))
    say(f"pool of larger pictures: {len(items)}")


def build_held_out(data: Path) -> None:
    """Writes `heldout.npz`: pixels uint8 [n, 64, 64, 3] and labels int32 [n] of the four tests."""
    sources, rng = load_sources(data), np.random.default_rng((SPLIT_SEED, 1))
    size = (IMAGE_SIDE, IMAGE_SIDE)
    things = np.arange(len(sources.drawings), dtype=np.int32)
    drawings = []
    for drawing in sources.test_drawings:
        drawings += [
            place_centred(drawing, IMAGE_SIDE),
            *(paint_drawing(drawing, size, 0.5, rng) for _ in range(2)),
        ]
    seen = np.repeat(things, 400 // len(things))
    numbers = held_out_numbers()
    fonts = [sources.test_fonts[index % len(sources.test_fonts)] for index in range(len(numbers))]
    augmented = [sources.paint("drawings", int(thing), size, rng) for thing in seen]
    written = [paint_number(int(number), font, size, 1.0, rng) for number, font in zip(numbers, fonts, strict=True)]
    handwriting = []
    for digit in sources.test_digits:
        paper = Image.new("L", size, 255)
        mask = digit_mask(digit, 56)
        paper.paste(0, (4, 4, 60, 60), mask)
        handwriting.append(paper.convert("RGB"))
    pictures = {
        "drawings": (drawings, np.repeat(things, 3)),
        "seen": (augmented, seen),
        "numbers": (written, numbers),
        "handwriting": (handwriting, sources.test_digit_labels),
    }
    arrays = {}
    for name, (images, labels) in pictures.items():
        arrays[f"{name}_pixels"] = np.stack([np.asarray(image) for image in images])
        arrays[f"{name}_label"] = np.asarray(labels, np.int32)
    temporary = data / ".heldout.tmp.npz"
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    temporary.replace(data / "heldout.npz")
    say("held-out pictures: " + ", ".join(f"{len(labels)} {name}" for name, (_, labels) in pictures.items()))


def main() -> None:
    """Makes whatever pool is not there yet."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - of the extra `tiny`: tests use this module without it

    parser = argparse.ArgumentParser(description="Make the pictures that the tiny Step3 is trained and tested on.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"data folder (default {DEFAULT_DATA})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training pools (default 0)")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the pools' sizes (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="make again what is there already")
    options = parser.parse_args()
    data = options.data.resolve()
    if options.force or not (data / "heldout.npz").exists():
        build_held_out(data)
    with ProcessPoolExecutor(WORKERS) as pool:
        for kind in KINDS:
            if options.force or not (data / f"pool-{kind}-label.npy").exists():
                build_pool(data, kind, round(POOL_SIZES[kind] * options.fraction), options.seed, pool)
        if options.force or not (data / "pool-large-label.npy").exists():
            build_large_pool(data, round(LARGE_SIZE * options.fraction), options.seed, pool)
    things = json.loads((data / "things.json").read_text(encoding="utf-8"))
    summary = {
        "seed": options.seed,
        "things": len(things),
        "pictures": {kind: len(np.load(data / f"pool-{kind}-label.npy")) for kind in (*KINDS, "large")},
        "held_out_artist": TEST_ARTIST,
        "held_out_fonts": list(HELD_OUT_FONTS),
        "held_out_numbers": held_out_numbers().tolist(),
        "held_out_digit_indices": split_digits(load_digits().target)[1].tolist(),
    }
    write_json(data / "pictures.json", summary)


if __name__ == "__main__":
    main()
