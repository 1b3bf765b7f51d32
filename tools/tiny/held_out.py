"""Makes the held-out material that comes after the pools: larger pictures, the tests' own samples, demo candidates.

Writes `DATA/heldout-large.npz` (pictures that are cut into windows), `tests/heldout/` (the small sets that are
committed) and `DATA/candidates/` (pictures of which `tools.tiny.examples` picks the demo's). Everything follows from
fixed seeds.

    python -m tools.tiny.held_out [--data DIR] [--tests DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny.canvas import digit_mask, paint_number, place_centred
from tools.tiny.drawings import TEST_ARTIST, IconSet
from tools.tiny.evaluate_cases import Case, CaseSet, join_sheet, load_call_set, load_fact_sets, load_picture_sets
from tools.tiny.fetch import DEFAULT_DATA, say, write_json
from tools.tiny.sources import SPLIT_SEED, Sources, held_out_numbers, load_sources
from tools.tiny.text_baselines import ngram_bits_per_byte

LARGE_DRAWING_SIDE, LARGE_NUMBER_SIZE, NUM_LARGE_NUMBERS = 200, (240, 100), 80
NUM_SENTENCES = 104  # 13 chunks of 8 lines
NUM_COMMITTED = {"seen": 28, "numbers": 32, "handwriting": 60, "capitals": 40, "tool-calls": 12}
CANDIDATE_SIDE = 96
TRAIN_CANDIDATES = (
    ("noto", "elephant"),
    ("noto", "guitar"),
    ("fluent-emoji-flat", "dog"),
    ("fluent-emoji-flat", "car"),
)
TEST_CANDIDATES = ("cat", "apple", "rocket", "penguin", "umbrella", "banana")
NUM_OTHER_CANDIDATES = 5
TEXT_CANDIDATES = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the capital of Kenya?",
    "What is a violin?",
    "Where is Brazil?",
    "Who are you?",
)
SOURCES_OF_DRAWINGS = {
    "noto": "Noto Emoji, by Google Inc., Apache-2.0 (npm @iconify-json/noto); drawn by an artist of the training set",
    "fluent-emoji-flat": "Fluent Emoji, by Microsoft Corporation, MIT (npm @iconify-json/fluent-emoji-flat); drawn by "
    "an artist of the training set",
    "twemoji": "Twemoji, copyright Twitter, Inc and other contributors, CC-BY-4.0 (npm @iconify-json/twemoji), put on "
    "white; never used in training",
}
ATTRIBUTION = """\
# Where these pictures come from

They are held out: no picture here, and no drawing, number or handwritten digit in one, was used in training, but for
the drawings of `seen.webp`, which show training drawings in a new augmentation.

- `unseen.webp`: Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY-4.0
  (https://creativecommons.org/licenses/by/4.0/), from the npm package @iconify-json/twemoji 1.2.5. Changed: scaled to
  64x64 on white (the first 40), and turned, shifted and tinted on other papers (the last 40).
- `seen.webp`: Noto Emoji (Apache-2.0, Google), Fluent Emoji (MIT, Microsoft), FxEmoji (Apache-2.0, Mozilla), changed
  in the same ways.
- `numbers.webp`: written by this project in the fonts DejaVu Serif, FreeSans Bold, FreeSerif Italic, Liberation Mono
  and Liberation Sans Narrow.
- `handwriting.webp`: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
  Repository, 1998, https://doi.org/10.24432/C50P49, CC-BY-4.0, as scikit-learn carries it; scaled up from 8x8.
- Sentences of `heldout.json`: WordNet 3.0, copyright 2006 by Princeton University, under the WordNet licence.
- Facts of `heldout.json`: countryinfo 1.0.1, MIT.
"""


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an archive under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    temporary.replace(path)


def build_large(data: Path, sources: Sources) -> None:
    """Writes `heldout-large.npz`: plain drawings by the unseen artist, held-out numbers in held-out fonts."""
    icons = IconSet(data / "raw/npm" / TEST_ARTIST / "package")
    things = json.loads((data / "things.json").read_text(encoding="utf-8"))
    side = LARGE_DRAWING_SIDE
    drawings = [
        place_centred(Image.fromarray(icons.draw(thing["drawings"][TEST_ARTIST], side)), side) for thing in things
    ]
    rng = np.random.default_rng((SPLIT_SEED, 2))
    long = held_out_numbers()[held_out_numbers() > 99]
    numbers = long[np.linspace(0, len(long) - 1, NUM_LARGE_NUMBERS).round().astype(int)]
    fonts = [sources.test_fonts[index % len(sources.test_fonts)] for index in range(len(numbers))]
    written = [
        paint_number(int(number), font, LARGE_NUMBER_SIZE, 1.0, rng)
        for number, font in zip(numbers, fonts, strict=True)
    ]
    arrays = {
        "large_drawings_pixels": np.stack([np.asarray(picture) for picture in drawings]),
        "large_drawings_label": np.arange(len(drawings), dtype=np.int32),
        "large_numbers_pixels": np.stack([np.asarray(picture) for picture in written]),
        "large_numbers_label": numbers.astype(np.int32),
    }
    save_npz(data / "heldout-large.npz", arrays)
    say(f"larger held-out pictures: {len(drawings)} drawings, {len(numbers)} numbers")


def choose_committed(data: Path) -> dict[str, CaseSet]:
    """The small sets of the repository's tests: a spread of each large one."""
    sets = {part.name: part for part in load_picture_sets(data)}
    clean, mild = sets["unseen-clean"].cases, sets["unseen-mild"].cases
    chosen = {
        "unseen": CaseSet(
            "unseen",
            "drawings, unseen artist: 40 plain, then 40 mildly augmented",
            clean[::2] + mild[2::4],  # two mild ones of each thing: the things that the plain ones leave out
        )
    }
    sets |= {part.name: part for part in (*load_fact_sets(data), load_call_set(data))}
    return chosen | {name: sets[name].take(count) for name, count in NUM_COMMITTED.items()}


def build_committed(data: Path, folder: Path) -> None:
    """Writes `heldout.json`, a lossless sheet of tiles for each set of pictures, and the attribution."""
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, dict[str, object]] = {}
    for name, part in choose_committed(data).items():
        entry: dict[str, object] = {"title": part.title, "cases": [case_record(case) for case in part.cases]}
        if part.cases[0].picture is not None:
            entry["file"] = f"{name}.webp"
            sheet = Image.fromarray(join_sheet([case.picture for case in part.cases]))
            temporary = folder / f".{name}.tmp"
            sheet.save(temporary, "WEBP", lossless=True, quality=100, method=6)
            temporary.replace(folder / entry["file"])
        record[name] = entry
    lines = (data / "text-sentences-heldout.txt").read_text(encoding="utf-8").splitlines()[:NUM_SENTENCES]
    train = b"".join((data / f"text-{name}-train.txt").read_bytes() for name in ("glosses", "sentences"))
    figure = ngram_bits_per_byte(train, "".join(line + "\n" for line in lines).encode())
    write_json(
        folder / "heldout.json",
        {"sets": record, "sentences": lines, "byte_6gram_bits_per_byte": round(figure, 4)},
    )
    write_text(folder / "ATTRIBUTION.md", ATTRIBUTION)
    total = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{folder}: {', '.join(record)}, {len(lines)} sentences; {total} bytes")


def case_record(case: Case) -> dict[str, object]:
    """A case as JSON, without its picture."""
    record: dict[str, object] = {"question": case.question, "answer": case.answer}
    return record | ({"tools": list(case.tools)} if case.tools else {})


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def build_candidates(data: Path, sources: Sources) -> None:
    """Writes pictures and `candidates.json`: kind, picture, prompt, right answer and source of each."""
    folder = data / "candidates"
    folder.mkdir(exist_ok=True)
    things = {thing["name"]: thing for thing in json.loads((data / "things.json").read_text(encoding="utf-8"))}
    entries = []

    def add(kind: str, name: str, picture: Image.Image, prompt: str, expected: str, source: str) -> None:
        picture.save(folder / name, "PNG", optimize=True)
        entry = {"kind": kind, "image": name, "prompt": prompt, "expected": expected, "source": source}
        entries.append(entry)

    drawings = [*TRAIN_CANDIDATES, *((TEST_ARTIST, name) for name in TEST_CANDIDATES)]
    for artist, name in drawings:
        icon = IconSet(data / "raw/npm" / artist / "package").draw(things[name]["drawings"][artist], 128)
        kind = "unseen drawing" if artist == TEST_ARTIST else "seen drawing"
        picture = place_centred(Image.fromarray(icon), 128)
        source = SOURCES_OF_DRAWINGS[artist]
        file = f"{name.replace(' ', '-')}.png"
        add(kind, file, picture, "What is this?", things[name]["answer"], source)
    rng = np.random.default_rng((SPLIT_SEED, 3))
    long = held_out_numbers()[held_out_numbers() > 999]
    for index, number in enumerate(rng.choice(long, NUM_OTHER_CANDIDATES, replace=False)):
        font = sources.test_fonts[index % len(sources.test_fonts)]
        picture = paint_number(int(number), font, LARGE_NUMBER_SIZE, 0.3, rng)
        source = f"written by this project in {Path(font).stem}; neither the number nor the font was used in training"
        add("number", f"number-{number}.png", picture, "What number is this?", f"The number is {number}.", source)
    source = (
        "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998, "
        "https://doi.org/10.24432/C50P49, CC-BY-4.0, scaled up from 8x8; not used in training"
    )
    for index in rng.choice(len(sources.test_digits), NUM_OTHER_CANDIDATES, replace=False):
        side, label = CANDIDATE_SIDE, sources.test_digit_labels[index]
        paper = Image.new("L", (side, side), 255)
        paper.paste(0, (6, 6, side - 6, side - 6), digit_mask(sources.test_digits[index], side - 12))
        file, answer = f"digit-{label}-{index}.png", f"The digit is {label}."
        add("handwriting", file, paper.convert("RGB"), "Which digit is this?", answer, source)
    rows = [
        json.loads(line)
        for name in ("facts", "small")
        for line in (data / f"chat-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    answers = {row["question"]: row["answer"] for row in rows}
    entries += [{"kind": "text", "prompt": prompt, "expected": answers[prompt]} for prompt in TEXT_CANDIDATES]
    write_json(folder / "candidates.json", entries)
    say(f"{folder}: {len(entries)} candidates")


def main() -> None:
    """Makes everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"data folder (default {DEFAULT_DATA})")
    parser.add_argument("--tests", type=Path, default=Path("tests/heldout"), help="default %(default)s")
    options = parser.parse_args()
    data = options.data.resolve()
    sources = load_sources(data)
    build_large(data, sources)
    build_committed(data, options.tests)
    build_candidates(data, sources)


if __name__ == "__main__":
    main()
