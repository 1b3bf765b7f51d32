"""Bits per byte of held-out sentences, and how evenly the routers spread them over the experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from step3_jax.layers.router import Routing
from step3_jax.model.step3 import Step3
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.train.loss import token_loss

SENTENCES_IN_CHUNK = 8  # as in training
ROWS_AT_ONCE, LENGTH_STEP = 25, 32


class TextScore(NamedTuple):
    """What a text costs, and where its tokens went.

    Attributes:
      bits_per_byte: Negative log2 likelihood of all tokens after the BOS token, over the bytes.
      num_bytes: Bytes scored, newlines counted.
      num_tokens: Tokens scored.
      shares: Share of (token, expert) pairs of each expert, [mixture layers, E]; rows sum to 1.
    """

    bits_per_byte: float
    num_bytes: int
    num_tokens: int
    shares: np.ndarray


def score_text(model: Step3, tokenizer: Tokenizer, sentences: Sequence[str]) -> TextScore:
    """Scores sentences in chunks of eight lines; each chunk starts afresh after a BOS token.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      sentences: Lines without newlines; each is scored with a newline after it.

    Raises:
      ValueError: If there is no sentence.
    """
    if not sentences:
        raise ValueError("no sentence to score; give at least one")
    starts = range(0, len(sentences), SENTENCES_IN_CHUNK)
    chunks = ["".join(line + "\n" for line in sentences[start : start + SENTENCES_IN_CHUNK]) for start in starts]
    rows = [tokenizer.encode(chunk, add_bos=True) for chunk in chunks]
    length = -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
    num_rows = -(-len(rows) // ROWS_AT_ONCE) * ROWS_AT_ONCE
    ids, is_token = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, length), bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], is_token[row, : len(tokens)] = tokens, True
    graphdef, state = nnx.split(model)
    nats, counts = 0.0, 0.0
    for start in range(0, num_rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        part_nats, part_counts = _score_rows(graphdef, state, ids[part], is_token[part])
        nats, counts = nats + float(part_nats), counts + np.asarray(part_counts, np.float64)
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return TextScore(nats / math.log(2) / num_bytes, num_bytes, int(is_token[:, 1:].sum()), shares)


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(
    graphdef: nnx.GraphDef, state: PyTree, ids: Int[Array, "B T"], is_token: Array
) -> tuple[Float[Array, ""], Float[Array, "layers E"]]:
    """Nats of all tokens but the first of each row, and pairs of each expert; padding is not counted."""
    decoder = nnx.merge(graphdef, state).text

    def count(routing: Routing) -> Float[Array, " E"]:
        chosen = jax.nn.one_hot(routing.experts, routing.logits.shape[1]).sum(axis=1)
        return jnp.sum(chosen * is_token.reshape(-1, 1), axis=0)

    hidden, _, counts = decoder.run(decoder.embed_tokens(ids), observe=count)
    logits = decoder.logits(hidden)[:, :-1]
    nats = token_loss(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    return jnp.sum(nats * is_token[:, 1:].reshape(-1)), jnp.concatenate(counts)
