"""Measures what simple methods reach on the held-out pictures, to print beside the tiny Step3's own results.

Writes `DATA/picture-baselines.json`: each entry has the test set, the method, its conditions and its accuracy
(a share of 1).

    python -m tools.tiny.picture_baselines [--data DIR] [--force]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tools.tiny.canvas import place_centred
from tools.tiny.fetch import DEFAULT_DATA, say, write_json
from tools.tiny.sources import HELD_OUT_FONTS, Sources, held_out_numbers, load_sources

NEIGHBOUR_SIDE = 32  # pixels a side at which drawings are compared

Entry = dict[str, str | float | int]


def entry(test: str, method: str, conditions: str, accuracy: float, num_pictures: int) -> Entry:
    """Returns one line of the record."""
    return {
        "test": test,
        "method": method,
        "conditions": conditions,
        "accuracy": round(accuracy, 4),
        "num_pictures": num_pictures,
    }


def shrink(pictures: np.ndarray) -> np.ndarray:
    """Scales uint8 [n, h, w, 3] pictures to float32 [n, 32 * 32 * 3]."""
    side = (NEIGHBOUR_SIDE, NEIGHBOUR_SIDE)
    images = (Image.fromarray(pixels).resize(side, Image.Resampling.BILINEAR) for pixels in pictures)
    small = [np.asarray(image) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float32)


def measure_drawings(sources: Sources, held_out: dict[str, np.ndarray]) -> list[Entry]:
    """Compares each held-out drawing with every training drawing pixel by pixel, and guesses by frequency."""
    labels = np.repeat(np.arange(len(sources.drawings)), [len(drawings) for drawings in sources.drawings])
    known = [np.asarray(place_centred(drawing, 64)) for drawings in sources.drawings for drawing in drawings]
    neighbours = KNeighborsClassifier(1).fit(shrink(np.stack(known)), labels)
    condition = (
        f"Euclidean distance of {NEIGHBOUR_SIDE}x{NEIGHBOUR_SIDE} RGB pixels to {len(labels)} training "
        f"drawings of {len(sources.drawings)} things, each centred on white; "
    )
    is_clean = np.arange(len(held_out["drawings_label"])) % 3 == 0
    is_seen = np.full(len(held_out["seen_label"]), True)
    results = []
    for name, test, chosen, state in (
        ("drawings", "unseen artist, centred on white", is_clean, "test drawings placed alike"),
        ("drawings", "unseen artist, mildly augmented", ~is_clean, "test drawings mildly augmented"),
        ("seen", "new augmentation of a seen drawing", is_seen, "test drawings augmented"),
    ):
        pixels, truth = held_out[f"{name}_pixels"][chosen], held_out[f"{name}_label"][chosen]
        accuracy = float((neighbours.predict(shrink(pixels)) == truth).mean())
        results.append(entry(test, "pixel nearest neighbour", condition + state, accuracy, len(truth)))
        share = float(np.bincount(truth).max() / len(truth))
        results.append(entry(test, "majority class", "things in equal shares", share, len(truth)))
    return results


def measure_numbers() -> list[Entry]:
    """Works out what guessing reaches on the held-out numbers."""
    numbers = held_out_numbers()
    lengths = np.array([len(str(number)) for number in numbers])
    fonts = f"{len(numbers)} held-out numbers in {len(HELD_OUT_FONTS)} held-out fonts"
    per_digit = float((1 / 9 + (lengths - 1) / 10).sum() / lengths.sum())  # the first of several is never 0
    whole = float((1 / (9 * 10.0 ** (lengths - 1))).mean())
    return [
        entry("numbers", "chance, per digit", f"{fonts}; number of digits known", per_digit, len(numbers)),
        entry("numbers", "chance, whole number", f"{fonts}; number of digits known", whole, len(numbers)),
        entry("numbers", "majority class", f"{fonts}; none of them in training", 0.0, len(numbers)),
    ]


def measure_handwriting(sources: Sources) -> list[Entry]:
    """Trains two classical methods on the handwritten digits' own 8x8 features."""
    train, test = (digits.reshape(-1, 64) / 16 for digits in (sources.digits, sources.test_digits))
    labels, truth = sources.digit_labels, sources.test_digit_labels
    split = f"8x8 grey values, {len(labels)} training and {len(truth)} test digits, stratified"
    methods = {
        "logistic regression": LogisticRegression(max_iter=2000),
        "1-nearest neighbour": KNeighborsClassifier(1),
    }
    results = [
        entry("handwriting", name, split, float(method.fit(train, labels).score(test, truth)), len(truth))
        for name, method in methods.items()
    ]
    majority = float((truth == np.bincount(labels).argmax()).mean())
    return [*results, entry("handwriting", "majority class", split, majority, len(truth))]


def main() -> None:
    """Writes `picture-baselines.json` unless it is there already.

    Raises:
      ValueError: If the held-out pictures have not been made.
    """
    parser = argparse.ArgumentParser(description="Measure simple methods on the held-out pictures.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"default {DEFAULT_DATA}")
    parser.add_argument("--force", action="store_true", help="measure again")
    options = parser.parse_args()
    target = options.data / "picture-baselines.json"
    if target.exists() and not options.force:
        say("picture baselines: there already")
        return
    if not (options.data / "heldout.npz").exists():
        raise ValueError(f"no heldout.npz in {options.data}; run `python -m tools.tiny.pictures` first")
    sources = load_sources(options.data.resolve())
    with np.load(options.data / "heldout.npz") as archive:
        held_out = dict(archive)
    results = [*measure_drawings(sources, held_out), *measure_numbers(), *measure_handwriting(sources)]
    write_json(target, results)
    for line in results:
        say(f"{line['test']:36} {line['method']:24} {line['accuracy']:.1%} of {line['num_pictures']}")


if __name__ == "__main__":
    main()
