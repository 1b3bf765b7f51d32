"""Bits per byte that simple text models reach on the held-out sentences; the tiny Step3 has to beat them.

Writes `DATA/text-baselines.json`. The model is compared on the same bytes: the held-out sentences joined by
newlines, each line's newline counted.

    python -m tools.tiny.text_baselines [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import lzma
import zlib
from pathlib import Path

import numpy as np

from tools.tiny.fetch import DEFAULT_DATA

NGRAM_ORDER = 6
ZLIB_WINDOW = 32768


def ngram_codes(text: bytes, order: int) -> np.ndarray:
    """Every run of `order` bytes as one integer, first byte highest; the text is preceded by newlines.

    Args:
      text: The bytes.
      order: 1 to 7, so that a code fits in 63 bits.

    Returns:
      int64, one code per byte of the text: the n-gram that ends there.
    """
    padded = np.frombuffer(b"\n" * (order - 1) + text, np.uint8).astype(np.int64)
    codes = np.zeros(len(text), np.int64)
    for start in range(order):
        codes = (codes << 8) | padded[start : start + len(text)]
    return codes


def look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`values` at the position of each query in the sorted `keys`; 0 if it is not among them."""
    places = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[places] == queries, values[places], 0)


def ngram_bits_per_byte(train: bytes, heldout: bytes, order: int = NGRAM_ORDER) -> float:
    """Byte n-gram with interpolated Witten-Bell smoothing.

    P_n(c | h) = (count(h c) + types(h) P_{n-1}(c | h')) / (count(h) + types(h)), with h' = h less its first
    byte and P_0 = 1/256 (Witten and Bell, 1991; in this form Chen and Goodman, 1998).

    Args:
      train: Text that is counted.
      heldout: Text that is predicted, byte by byte.
      order: Length of the longest n-gram in bytes, at most 7.
    """
    probability = np.full(len(heldout), 1 / 256)
    for n in range(1, order + 1):
        grams, counts = np.unique(ngram_codes(train, n), return_counts=True)
        contexts, first, types = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        queries = ngram_codes(heldout, n)
        count = look_up(grams, counts, queries)
        total = look_up(contexts, totals, queries >> 8)
        num_types = look_up(contexts, types, queries >> 8)
        mixed = (count + num_types * probability) / np.maximum(total + num_types, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log2(probability).mean())


def xz_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """How much longer xz's output becomes when the held-out text follows the training text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    both, alone = (len(lzma.compress(text, filters=filters)) for text in (train + heldout, train))
    return 8 * (both - alone) / len(heldout)


def zlib_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """Zlib at level 9; `train` primes its window, may be empty."""
    if train:
        compressor = zlib.compressobj(9, zdict=train[-ZLIB_WINDOW:])
    else:
        compressor = zlib.compressobj(9)
    return 8 * len(compressor.compress(heldout) + compressor.flush()) / len(heldout)


def measure(data: Path) -> dict[str, float | int]:
    """All baselines, in bits per byte.

    Raises:
      ValueError: If the corpus has not been written.
    """
    texts = []
    for name in ("text-sentences-train.txt", "text-glosses-train.txt", "text-sentences-heldout.txt"):
        if not (data / name).exists():
            raise ValueError(
                f"{data / name} does not exist: run `python -m tools.tiny.text_corpus --data {data}` first"
            )
        texts.append((data / name).read_bytes())
    sentences, glosses, heldout = texts
    everything = glosses + sentences
    return {
        "num_bytes": len(heldout),
        "num_sentences": heldout.count(b"\n"),
        "byte_6gram": ngram_bits_per_byte(everything, heldout),
        "byte_6gram_sentences_only": ngram_bits_per_byte(sentences, heldout),
        "xz_primed": xz_bits_per_byte(everything, heldout),
        "xz_primed_sentences_only": xz_bits_per_byte(sentences, heldout),
        "zlib_primed": zlib_bits_per_byte(sentences, heldout),
        "zlib": zlib_bits_per_byte(b"", heldout),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data folder (default: %(default)s)")
    data = parser.parse_args().data.expanduser()
    result = {key: round(value, 4) for key, value in measure(data).items()}
    path = data / "text-baselines.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
