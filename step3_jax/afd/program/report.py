"""Gathers the report of a decode call on all devices with one collective, its arrays packed as one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.engine.state import DraftCounts, Report
from step3_jax.sampling.batch import logprob_width
from step3_jax.sampling.sampler import StepLogprobs


def gather_report(own: Report, topology: AfdTopology) -> Report:
    """The report of all attention devices' rows, from each one's own; inside `jax.shard_map` over the union mesh.

    FFN devices call it too, with a report of the same shapes that is not read.
    """
    leaves, treedef = jax.tree.flatten(own)
    num_rows = leaves[0].shape[0]
    # All dtypes have four bytes.
    packed = [jax.lax.bitcast_convert_type(leaf, jnp.int32).reshape(num_rows, -1) for leaf in leaves]
    gathered = jax.lax.all_gather(jnp.concatenate(packed, axis=1), UNION, axis=0, tiled=True)
    gathered = gathered[: topology.num_attention * num_rows]
    found, start = [], 0
    for leaf in leaves:
        end = start + math.prod(leaf.shape[1:])
        part = gathered[:, start:end].reshape(-1, *leaf.shape[1:])
        found.append(jax.lax.bitcast_convert_type(part, leaf.dtype))
        start = end
    return jax.tree.unflatten(treedef, found)


def fill_report(value: Int[Array, ""], num_rows: int, max_steps: int, vocab_size: int, num_guesses: int = 0) -> Report:
    """A report full of one number: what an FFN device has to give, once that number is known.

    Args:
      value: The number.
      num_rows: Rows of each attention device.
      max_steps: Tokens of a row that the report has room for.
      vocab_size: V.
      num_guesses: Most guesses of a row in a step; 0 for a report that counts none.
    """

    def fill(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> Array:
        return jnp.full((num_rows, *shape), value, dtype)

    wide = (max_steps, logprob_width(vocab_size))
    logprobs = StepLogprobs(
        fill(max_steps, dtype=jnp.float32), fill(max_steps), fill(*wide), fill(*wide, dtype=jnp.float32)
    )
    drafts = DraftCounts(fill(), fill(num_guesses), fill(num_guesses)) if num_guesses else None
    return Report(fill(max_steps), fill(), fill(), logprobs, drafts)
