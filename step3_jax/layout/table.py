"""Which axis of which array lies on which axis of the mesh: ONE table of each, collisions refused.

The devices are dp x tp. Sequences and their KV cache are spread over all of them: with one key/value head, tensor
parallel attention would need a copy of the cache on each of tp devices. What stands outside the routed experts is cut in
tp parts (o-proj, dense layers, shared expert, head, embedding) or copied (the rest). The routed experts cut the same
devices another way: into ep groups of experts, and the width of each expert over the devices of a group.

So that both ways are axes of one mesh, it has four axes, each named by its part in the first way and in the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from step3_jax.layout.parallel import AttentionForm, Parallel

# Of the mesh, slowest first: the devices of a tensor group are neighbours.
AXES = ("data_expert", "data_width", "tensor_expert", "tensor_width")
_DATA, _TENSOR = AXES[:2], AXES[2:]
_EXPERT, _WIDTH = AXES[0::2], AXES[1::2]

# THE table: logical axis -> axes of the mesh.
RULES = {
    "rows": AXES,  # sequences, their tokens, the pages of their cache
    "images": AXES,
    "heads": (),  # query heads: rows of wq
    "values": _TENSOR,  # what the heads give: columns of o_proj
    "embedding": _TENSOR,  # columns of the embedding table
    "vocabulary": _TENSOR,  # rows of the head, filled up with zeros where they do not divide
    "width": _TENSOR,  # inner width of the dense layers and of the shared expert
    "experts": _EXPERT,
    "expert_width": _WIDTH,
}
# What is different where a user asks for tensor parallel attention.
TENSOR_ATTENTION = {"rows": _DATA, "heads": _TENSOR}

# End of a parameter's path -> logical axis of each of its axes. All others are copied to every device.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "text.embed_tokens.weight": (None, "embedding"),
    "self_attn.wq.weight": ("heads", None),
    "self_attn.o_proj.weight": (None, "values"),
    "ffn.mlp.gate_proj.weight": ("width", None),
    "ffn.mlp.up_proj.weight": ("width", None),
    "ffn.mlp.down_proj.weight": (None, "width"),
    "ffn.share_expert.gate_proj.weight": ("width", None),
    "ffn.share_expert.up_proj.weight": ("width", None),
    "ffn.share_expert.down_proj.weight": (None, "width"),
    "ffn.moe.gate_proj": ("experts", "expert_width", None),
    "ffn.moe.up_proj": ("experts", "expert_width", None),
    "ffn.moe.down_proj": ("experts", None, "expert_width"),
    "text.lm_head.weight": ("vocabulary", None),
}


def mesh_axes(logical: str, attention: AttentionForm = "data") -> tuple[str, ...]:
    """The mesh axes that a logical axis lies on.

    Raises:
      ValueError: If the table has no such axis.
    """
    table = RULES | (TENSOR_ATTENTION if attention == "tensor" else {})
    if logical not in table:
        raise ValueError(f"there is no logical axis {logical!r}; the table has {', '.join(table)}")
    return table[logical]


def assign_axes(axes: Sequence[str | None], attention: AttentionForm = "data") -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each axis of an array lies on, empty for one that is whole everywhere.

    Args:
      axes: The logical names of the array's axes; None for an axis that is whole everywhere.
      attention: As in `Parallel`.

    Raises:
      ValueError: If two axes would lie on the same axis of the mesh.
    """
    entries = tuple(mesh_axes(name, attention) if name is not None else () for name in axes)
    used = [axis for entry in entries for axis in entry]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(f"an array with the axes {tuple(axes)} would lie twice on {', '.join(twice)} of the mesh")
    return entries


def parameter_axes(path: Sequence[str | int]) -> tuple[str | None, ...]:
    """The logical axes of the parameter at `path` of a `Step3`, or of its FP8 scales; empty if it is copied."""
    name = ".".join(str(part) for part in path)
    return next((axes for end, axes in PARAMETERS.items() if name.endswith(end)), ())


def shard_shape(shape: Sequence[int], path: Sequence[str | int], parallel: Parallel) -> tuple[int, ...]:
    """What one device has of the parameter at `path`.

    Args:
      shape: Of the whole parameter.
      path: Of the parameter.
      parallel: The setting; its ep is known. Rows that do not divide are filled up.
    """
    devices = dict(zip(AXES, parallel.mesh_shape, strict=True))
    entries = assign_axes(parameter_axes(path), parallel.attention)
    parts = [math.prod(devices[axis] for axis in entry) for entry in entries] or [1] * len(shape)
    return tuple(-(-size // count) for size, count in zip(shape, parts, strict=True))
