"""Memory for activations, estimated from shapes: what one call needs besides weights and cache.

A program compiled for a CPU does not show it: XLA:CPU widens FP8 and BF16 and has none of the GPU's kernels. The sums
below count the arrays that the GPU's path holds at once, each expert's rows in the worst case (all tokens choose experts
of one device, as no token is dropped), and take the largest phase. They are estimates, and are labelled so.
"""

from __future__ import annotations

import dataclasses

from step3_jax.config import NUM_CLASS_TOKENS, ModelConfig
from step3_jax.layout.parallel import ATTENTION, FFN
from step3_jax.layout.role import Role

# Rows that the last tile of each expert is padded to.
TILE_ROWS = 128
# Arrays of a decode step that have a number for each token of the device's own sequences: its part of the history, what the
# loop carries of it, and two of the look-up.
_LOOKUP_ARRAYS = 4
_TOKEN_BYTES = 4
# Prompt tokens that each device reads at once, unless a user says otherwise.
DEFAULT_CHUNK_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Bytes on one device; phases follow one another, so the largest counts.

    Attributes:
      decode: A decode step.
      prefill: A chunk of prompts.
      image: One image in the vision tower; 0 without one.
      history: Prompt and output of the sequences, there in all phases where tokens are guessed; else 0.
    """

    decode: int
    prefill: int
    image: int
    history: int = 0

    @property
    def total(self) -> int:
        """Of the largest phase, with what is there in all of them."""
        return self.history + max(self.decode, self.prefill, self.image)

    @property
    def phase(self) -> str:
        """Name of the largest phase."""
        sizes = {"decode": self.decode, "prefill": self.prefill, "image": self.image}
        return max(sizes, key=sizes.__getitem__)


def estimate_workspace(
    config: ModelConfig,
    weights: str,
    role: Role,
    *,
    rows: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    num_sources: int | None = None,
    num_microbatches: int = 0,
    step_tokens: int = 1,
    history_tokens: int = 0,
) -> Workspace:
    """The estimate for one device of a role.

    Args:
      config: From `role.deployed_config`.
      weights: One of `weight_form.WEIGHTS`.
      role: What the device holds.
      rows: Sequences that each device with a cache decodes at once; of a micro-batch where there are several.
      chunk_tokens: Prompt tokens that each such device reads at once.
      num_sources: Devices that tokens come from; all of the role if absent.
      num_microbatches: In flight between attention and FFN; 0 where every device does both.
      step_tokens: T, of each sequence in a decode step: more than one where tokens are guessed.
      history_tokens: That all sequences of a device with a cache have room for; read where tokens are guessed.
    """
    itemsize = 4 if weights == "float32" else 2
    # A gathered batch: every device computes its experts' part of the tokens of all.
    num_sources = role.num_devices if num_sources is None else num_sources

    def phase(tokens: int, *, has_head: bool) -> int:
        # Both directions of each micro-batch in flight, at most one row a token each.
        exchange = num_microbatches * tokens * config.text.hidden_size * 2 * itemsize
        if role.name == FFN:
            exchange = exchange * num_sources // role.num_devices
        needed = [0]
        if role.has_cache:
            needed.append(_attention_bytes(config, tokens, itemsize))
        if role.has_cache and has_head:
            # The device's part, the whole row, and the row in float32.
            needed.append(tokens * config.text.vocab_size * (2 * itemsize + 4))
        if role.name != ATTENTION:
            needed.append(_ffn_bytes(config, weights, role, tokens * num_sources, itemsize))
        residual = tokens * config.text.hidden_size * 2 * itemsize if role.has_cache else 0
        return exchange + residual + max(needed)

    image = _image_bytes(config, role, itemsize) if role.has_cache else 0
    decode = phase(rows * step_tokens, has_head=True)
    history = _TOKEN_BYTES * history_tokens if step_tokens > 1 and role.has_cache else 0
    # Every device keeps the tokens of the sequences of all.
    return Workspace(
        decode + _LOOKUP_ARRAYS * history, phase(chunk_tokens, has_head=False), image, history * _count_shards(role)
    )


def _count_shards(role: Role) -> int:
    """Parts that the sequences of a role with a cache are in."""
    return role.parallel.dp if role.parallel.attention == "tensor" else role.num_devices


def _attention_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    text = config.text
    low_rank = tokens * text.share_q_dim * itemsize
    # Queries, attention's output, and what o-proj's exchange turns it into; the sums before it in float32.
    heads = tokens * text.query_size * (3 * itemsize + 4)
    return low_rank + heads + tokens * text.hidden_size * itemsize


def _ffn_bytes(config: ModelConfig, weights: str, role: Role, tokens: int, itemsize: int) -> int:
    text, parallel = config.text, role.parallel
    # FP8 products read rows in FP8.
    packed = 1 if weights == "fp8" else itemsize
    gathered = tokens * text.hidden_size * 2 * itemsize
    dense = tokens // parallel.dp * text.intermediate_size // parallel.tp * 3 * itemsize
    if not text.moe_layers:
        return gathered + dense
    experts = text.moe_num_experts // parallel.expert_groups
    width = text.moe_intermediate_size // parallel.expert_width_parts
    pairs = tokens * text.moe_top_k + experts * TILE_ROWS
    routed = pairs * (text.hidden_size * (packed + itemsize) + width * packed)
    shared = tokens // parallel.dp * text.share_expert_dim // parallel.tp * 3 * itemsize
    return gathered + max(routed + shared, dense)


def _image_bytes(config: ModelConfig, role: Role, itemsize: int) -> int:
    vision = config.vision
    if vision is None:
        return 0
    tokens = NUM_CLASS_TOKENS + vision.grid**2
    shards = role.num_tower_shards
    heads, inner = -(-vision.num_attention_heads // shards), -(-vision.intermediate_size // shards)
    # Scores and their softmax in float32, then as weights.
    attention = heads * tokens**2 * (8 + itemsize) + 4 * tokens * heads * vision.head_dim * itemsize
    mlp = 2 * tokens * inner * itemsize
    return 2 * tokens * vision.hidden_size * itemsize + max(attention, mlp)
