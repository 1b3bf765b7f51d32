"""Picks the demo's pictures and questions from the candidates: those that the model answers correctly.

python -m tools.tiny.held_out                    # makes the candidates
python -m tools.tiny.examples [MODEL] [--out DIR] [--count N]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from step3_jax import resources
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.llm import LLM
from tools.tiny.evaluate_answers import ask_all
from tools.tiny.evaluate_cases import Case
from tools.tiny.fetch import DEFAULT_DATA, say, write_json

KINDS = ("unseen drawing", "seen drawing", "number", "handwriting", "text")

Entry = Mapping[str, str]


def pick(entries: Sequence[Entry], is_right: Sequence[bool], count: int) -> list[Entry]:
    """The first `count` right entries of each kind, in the order of `KINDS`.

    Raises:
      ValueError: If the model answers no entry of a kind.
    """
    picked = []
    for kind in KINDS:
        right = [entry for entry, good in zip(entries, is_right, strict=True) if good and entry["kind"] == kind]
        if not right:
            raise ValueError(
                f"the model answers no candidate of kind {kind!r} correctly; add candidates to held_out.py"
            )
        picked += right[:count]
    return picked


def ask(llm: LLM, folder: Path, entries: Sequence[Entry]) -> list[bool]:
    """Whether the model answers each candidate correctly."""
    right: dict[int, bool] = {}
    for has_picture in (True, False):
        numbers = [number for number, entry in enumerate(entries) if ("image" in entry) is has_picture]
        cases = [to_case(folder, entries[number]) for number in numbers]
        for number, reply in zip(numbers, ask_all(llm, cases), strict=True):
            right[number] = reply.is_right
            mark = "right" if reply.is_right else f"wrong, said {reply.answer!r}"
            say(f"{entries[number]['kind']:15} {entries[number]['expected']:45} {mark}")
    return [right[number] for number in range(len(entries))]


def to_case(folder: Path, entry: Entry) -> Case:
    """A candidate as a question."""
    if "image" not in entry:
        return Case(entry["prompt"], entry["expected"])
    with Image.open(folder / entry["image"]) as picture:
        return Case(entry["prompt"], entry["expected"], np.asarray(picture.convert("RGB")))


def write_examples(folder: Path, out: Path, entries: Sequence[Entry]) -> None:
    """Copies the pictures and writes `examples.json` and `ATTRIBUTION.md`; other pictures in `out` are removed."""
    out.mkdir(parents=True, exist_ok=True)
    names = {entry["image"] for entry in entries if "image" in entry}
    for old in out.glob("*.png"):
        if old.name not in names:
            old.unlink()
    for name in names:
        shutil.copyfile(folder / name, out / name)
    keys = ("image", "prompt", "expected")
    write_json(out / "examples.json", [{key: entry[key] for key in keys if key in entry} for entry in entries])
    lines = [f"- `{entry['image']}`: {entry['source']}." for entry in entries if "image" in entry]
    text = "# Where these pictures come from\n\n" + "\n".join(lines) + "\n"
    temporary = out / ".ATTRIBUTION.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / "ATTRIBUTION.md")
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{out}: {len(entries)} examples, {len(names)} pictures, {size} bytes")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="model folder (default: the shipped tiny model)")
    parser.add_argument("--candidates", type=Path, default=DEFAULT_DATA / "candidates", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="default: examples/ of the shipped tiny model")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="of each kind (default %(default)s)")
    options = parser.parse_args()
    source = options.candidates / "candidates.json"
    if not source.exists():
        raise ValueError(f"no {source}; run `python -m tools.tiny.held_out` first")
    if options.count < 1:
        parser.error(f"--count is {options.count}; give at least 1")
    enable_compile_cache()
    shipped = resources.find("models/step3-tiny")
    entries = json.loads(source.read_text(encoding="utf-8"))
    is_right = ask(LLM(options.model or shipped, dtype="float32"), options.candidates, entries)
    write_examples(options.candidates, options.out or shipped / "examples", pick(entries, is_right, options.count))


if __name__ == "__main__":
    main()
