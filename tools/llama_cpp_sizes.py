"""Sizes of the model that llama.cpp runs as a peer of the 100M model of `step3 bench`."""

from __future__ import annotations

HIDDEN, LAYERS, HEADS, HEAD_DIM = 1024, 7, 16, 128
EXPERTS, CHOSEN, EXPERT_WIDTH = 16, 4, 768
VOCABULARY, CONTEXT = 16 * HIDDEN, 4096
# q8_0: 32 values of one byte each and a two-byte scale.
Q8_BYTES = 34 / 32


def active_parameters() -> int:
    """Weights that one token is multiplied by."""
    attention = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * HEAD_DIM
    experts = CHOSEN * 3 * HIDDEN * EXPERT_WIDTH + EXPERTS * HIDDEN
    return LAYERS * (attention + experts) + VOCABULARY * HIDDEN
