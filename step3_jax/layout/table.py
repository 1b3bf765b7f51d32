"""Which axis of which array is sharded along which axis of the mesh: ONE table of each, collisions refused.

The devices are dp x tp. Sequences and their KV cache are spread over all of them: with one key/value head, tensor
parallel attention would need a copy of the cache on each of tp devices. Weights outside the routed experts are sharded in
tp parts (o-proj, dense layers, shared expert, head, embedding) or copied (the rest). The routed experts divide the same
devices another way: into ep groups of experts, with the width of each expert over the devices of a group. The vision tower
is sharded in tp parts, and the devices of a group encode an image together, or it is copied, and each has its own images.

So that both ways are axes of one mesh, it has four axes, each named by its part in the first way and in the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from step3_jax.config import VisionConfig
from step3_jax.layout.parallel import AttentionForm, Parallel, VisionForm

# Axes of the mesh, slowest first: the devices of a tensor group are neighbours.
AXES = ("data_expert", "data_width", "tensor_expert", "tensor_width")
_DATA, _TENSOR = AXES[:2], AXES[2:]
_EXPERT, _WIDTH = AXES[0::2], AXES[1::2]

# THE table: logical axis -> axes of the mesh.
RULES = {
    "rows": AXES,  # sequences, their tokens, the pages of their cache
    "images": _DATA,  # squares of pixels that the vision tower takes
    "vision_heads": _TENSOR,  # of the tower, padded with zeros where they do not divide, as is the vision width
    "vision_width": _TENSOR,  # inner width of the tower's MLPs, channels between the last two products of the projector
    "heads": (),  # query heads: rows of wq
    "values": _TENSOR,  # outputs of the heads: columns of o_proj
    "embedding": _TENSOR,  # columns of the embedding table
    "vocabulary": _TENSOR,  # rows of the head, padded with zeros where they do not divide
    "width": _TENSOR,  # inner width of the dense layers and of the shared expert
    "experts": _EXPERT,
    "expert_width": _WIDTH,
}
# Differences for tensor parallel attention.
TENSOR_ATTENTION = {"rows": _DATA, "heads": _TENSOR}
# Differences if every device has the whole tower, and its own images.
DATA_VISION: dict[str, tuple[str, ...]] = {"images": AXES, "vision_heads": (), "vision_width": ()}

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
    "self_attn.qkv_proj.weight": (None, "vision_heads", None, None),
    "self_attn.qkv_proj.bias": (None, "vision_heads", None),
    "self_attn.out_proj.weight": (None, None, "vision_heads", None),
    "mlp.fc1.weight": ("vision_width", None),
    "mlp.fc1.bias": ("vision_width",),
    "mlp.fc2.weight": (None, "vision_width"),
    "projector.vit_downsampler2.weight": ("vision_width", None, None, None),
    "projector.vit_downsampler2.bias": ("vision_width",),
    "projector.vit_large_projector.weight": (None, "vision_width"),
}
# End of a parameter's path -> the axis that its sharded form splits into three, and the first of them: parts (q, k
# and v, which the release has in one tensor), heads, head size.
HEAD_AXES = {
    "self_attn.qkv_proj.weight": (0, 3),
    "self_attn.qkv_proj.bias": (0, 3),
    "self_attn.out_proj.weight": (1, 1),
}


def mesh_axes(logical: str, attention: AttentionForm = "data", vision: VisionForm = "weights") -> tuple[str, ...]:
    """The mesh axes that a logical axis is sharded along.

    Raises:
      ValueError: If the table has no such axis.
    """
    table = RULES | (TENSOR_ATTENTION if attention == "tensor" else {}) | (DATA_VISION if vision == "data" else {})
    if logical not in table:
        raise ValueError(f"there is no logical axis {logical!r}; the table has {', '.join(table)}")
    return table[logical]


def assign_axes(
    axes: Sequence[str | None], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each axis of an array is sharded along, empty for one that is not sharded.

    Args:
      axes: The logical names of the array's axes; None for an axis that is not sharded.
      attention: As in `Parallel`.
      vision: As in `Parallel`.

    Raises:
      ValueError: If two axes would be sharded along the same mesh axis.
    """
    entries = tuple(mesh_axes(name, attention, vision) if name is not None else () for name in axes)
    used = [axis for entry in entries for axis in entry]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(
            f"an array with the axes {tuple(axes)} would be sharded twice along {', '.join(twice)} of the mesh"
        )
    return entries


def parameter_axes(path: Sequence[str | int]) -> tuple[str | None, ...]:
    """The logical axes of the parameter at `path` of a `Step3`, or of its FP8 scales; empty if it is always copied.

    They are the axes of its sharded form, see `view_shape`.
    """
    name = ".".join(str(part) for part in path)
    return next((axes for end, axes in PARAMETERS.items() if name.endswith(end)), ())


def assign_parameter(
    path: Sequence[str | int], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each of `parameter_axes`; empty if the parameter is copied."""
    entries = assign_axes(parameter_axes(path), attention, vision)
    return entries if any(entries) else ()


def view_shape(
    shape: tuple[int, ...], path: Sequence[str | int], num_axes: int, vision: VisionConfig | None
) -> tuple[int, ...]:
    """The shape in which a parameter is sharded: its own, or with the vision tower's heads as an axis.

    Args:
      shape: Its shape in the checkpoint.
      path: The parameter's path.
      num_axes: Axes that its sharding has, or that it has on its devices.
      vision: Sizes of the tower.
    """
    if num_axes <= len(shape) or vision is None:
        return shape
    name = ".".join(str(part) for part in path)
    axis, parts = next(found for end, found in HEAD_AXES.items() if name.endswith(end))
    return (*shape[:axis], parts, vision.num_attention_heads, vision.head_dim, *shape[axis + 1 :])


def shard_shape(
    shape: tuple[int, ...], path: Sequence[str | int], parallel: Parallel, vision: VisionConfig | None = None
) -> tuple[int, ...]:
    """The shape of one device's part of the parameter at `path`.

    Args:
      shape: Shape of the whole parameter, in the checkpoint.
      path: The parameter's path.
      parallel: The setting; its ep is known. Axes that do not divide are padded.
      vision: Sizes of the vision tower; without one there are no parameters of it.
    """
    devices = dict(zip(AXES, parallel.mesh_shape, strict=True))
    entries = assign_parameter(path, parallel.attention, parallel.vision)
    view = view_shape(shape, path, len(entries), vision)
    parts = [math.prod(devices[axis] for axis in entry) for entry in entries] or [1] * len(shape)
    return tuple(-(-size // count) for size, count in zip(view, parts, strict=True))
