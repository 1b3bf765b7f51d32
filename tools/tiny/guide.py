"""Where attention should look when a token is copied: told to a few heads, since it takes long to be found by chance.

An induction circuit needs a head that looks at the token before and a later one that looks for what followed it; neither
is of use alone, so that little but chance leads to the first of them.
"""

from __future__ import annotations

import numpy as np

from step3_jax.text.tokenizer import Tokenizer
from step3_jax.train.data import PREFIX, TokenRows

FULL_WEIGHT = 1.0


def bare_ids(tokenizer: Tokenizer) -> np.ndarray:
    """For each id one that stands for the same text whatever blanks are around it; -1 if it has no letter or digit."""
    texts = [tokenizer.decode([token]).strip() for token in range(tokenizer.num_ids)]
    first: dict[str, int] = {}
    for token, text in enumerate(texts):
        first.setdefault(text, token)
    return np.array([first[text] if any(map(str.isalnum, text)) else -1 for text in texts], np.int32)


def find_sources(rows: TokenRows, bare: np.ndarray) -> np.ndarray:
    """For each place before a token that counts in full: the place that the token is copied from.

    Args:
      rows: Rows [B, T].
      bare: Of `bare_ids`.

    Returns:
      int32 [B, T]: for the place that predicts a token the source of it: the earlier token with the same text that has most
      equal tokens on both sides; -1 without one.
    """
    ids, segments = bare[np.asarray(rows.ids)], np.asarray(rows.segments)
    num_rows, length = ids.shape
    order = np.arange(length)
    sees = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == PREFIX)
    sees &= order[None, :] < order[:, None]
    equal = (np.asarray(rows.ids)[:, :, None] == np.asarray(rows.ids)[:, None, :]) & sees
    equal |= (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0) & sees
    before, after = np.zeros_like(equal, np.int16), np.zeros_like(equal, np.int16)
    before[:] = after[:] = equal
    for place in range(1, length):
        before[:, place, 1:] += equal[:, place, 1:] * before[:, place - 1, :-1]
    for place in range(length - 2, -1, -1):
        after[:, place, :-1] += equal[:, place, :-1] * after[:, place + 1, 1:]
    score = np.where(equal, before + after, 0)
    best = score.argmax(axis=2)
    has_source = (score.max(axis=2) > 0) & (ids >= 0)
    sources = np.full((num_rows, length), -1, np.int32)
    counts = (np.asarray(rows.weights)[:, :-1] == FULL_WEIGHT) & has_source[:, 1:]
    sources[:, :-1] = np.where(counts, best[:, 1:], -1)
    return sources
