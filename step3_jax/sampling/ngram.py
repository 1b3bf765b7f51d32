"""Guesses the next tokens from the sequence itself: those that followed an earlier occurrence of its last n-gram.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), on the device: no host takes part in a step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from step3_jax.sampling.speculation import Speculation

# No token has these ids, and they are never equal.
_BEFORE_START, _NO_TOKEN = -1, -2


def find_drafts(
    history: Int[Array, "B M"], lengths: Int[Array, " B"], speculation: Speculation
) -> tuple[Int[Array, "B guesses"], Bool[Array, " B"]]:
    """Guesses what follows each row.

    The longest n-gram at the row's end that occurred before counts, and its latest occurrence. If fewer tokens
    follow it than are requested, they are repeated: a row that ends in "a b a b" continues so.

    Args:
      history: Tokens of each row; entries from its length on are not read.
      lengths: Tokens of each row.
      speculation: How many tokens to guess, and how long the n-grams are.

    Returns:
      The tokens, and whether there are any.
    """
    width, longest = history.shape[1], speculation.prompt_lookup_max
    rows, places = jnp.arange(history.shape[0])[:, None], jnp.arange(width, dtype=jnp.int32)
    last = lengths[:, None] - 1
    padded = jnp.pad(history, ((0, 0), (longest - 1, 0)), constant_values=_BEFORE_START)
    # Where an n-gram may end: before the row's last token.
    is_same = places < last
    num_same = jnp.zeros(history.shape, jnp.int32)
    for back in range(longest):
        own = history.at[rows, last - back].get(mode="clip")
        own = jnp.where(last >= back, own, _NO_TOKEN)
        first = longest - 1 - back
        is_same &= padded[:, first : first + width] == own
        num_same += is_same
    num_same = jnp.where(num_same >= speculation.prompt_lookup_min, num_same, 0)
    # One maximum finds both: n-grams are short, and rows have less than 2^27 tokens.
    best = jnp.max(num_same * width + places, axis=1, keepdims=True)
    place, is_found = best % width, best >= width
    distance = jnp.maximum(last - place, 1)
    ahead = jnp.arange(speculation.num_speculative_tokens, dtype=jnp.int32) % distance
    drafts = history.at[rows, place + 1 + ahead].get(mode="clip")
    return drafts.astype(jnp.int32), is_found[:, 0]
