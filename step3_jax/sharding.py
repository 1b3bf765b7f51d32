"""Which axis of which array lies on which axis of the mesh: ONE table of each, one function, collisions refused.

The devices are dp x tp. Sequences and their KV cache are spread over all of them: with one key/value head, tensor
parallel attention would need a copy of the cache on each of tp devices. What stands outside the routed experts is cut in
tp parts (o-proj, dense layers, shared expert, head, embedding) or copied (the rest). The routed experts cut the same
devices another way: into ep groups of experts, and the width of each expert over the devices of a group.

So that both ways are axes of one mesh, it has four axes, each named by its part in the first way and in the second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from jax.sharding import PartitionSpec

from step3_jax.config import TextConfig, VisionConfig

# Of the mesh, slowest first: the devices of a tensor group are neighbours.
AXES = ("data_expert", "data_width", "tensor_expert", "tensor_width")
_DATA, _TENSOR = AXES[:2], AXES[2:]
_EXPERT, _WIDTH = AXES[0::2], AXES[1::2]

AttentionForm = Literal["data", "tensor"]
ExchangeForm = Literal["auto", "gather", "all_to_all"]
VisionForm = Literal["weights", "data"]

# THE table: logical axis -> axes of the mesh.
RULES = {
    "rows": AXES,  # sequences, their tokens, the pages of their cache
    "images": _DATA,  # squares of pixels that the vision tower takes
    "vision_heads": _TENSOR,  # of the tower; its last axes may be filled up with zeros like the vocabulary
    "vision_width": _TENSOR,  # inner width of the tower's MLPs, and channels between the projector's last two products
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
# And where every device is to have the whole tower, and images of its own.
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
# End of a parameter's path -> the axis that becomes three where it is sharded: parts (q, k and v), heads, head size.
HEAD_AXES = {
    "self_attn.qkv_proj.weight": (0, 3),
    "self_attn.qkv_proj.bias": (0, 3),
    "self_attn.out_proj.weight": (1, 1),
}


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a model is spread over dp x tp devices.

    Attributes:
      dp: Groups of devices that have the weights outside the routed experts once each.
      tp: Devices of such a group; they share out these weights.
      ep: Groups that the routed experts are shared out over, a divisor of dp x tp; the devices of such a group share out
        the width of each expert. None takes the most that the model allows.
      attention: "data": every device has sequences of its own. "tensor": the tp devices of a group share out the query
        heads, and each has a copy of the group's KV cache.
      exchange: How tokens come to their experts. "gather": every device gets all tokens, and what each expert adds is
        summed by the reduce-scatter that takes them back. "all_to_all": tokens go only where one of their experts is.
        "auto": the latter where the experts are spread over several hosts.
      vision: "weights": the tp devices of a group share out the weights of vision tower and projector, and encode each
        image together. "data": every device has all of them, and images of its own.
    """

    dp: int = 1
    tp: int = 1
    ep: int | None = None
    attention: AttentionForm = "data"
    exchange: ExchangeForm = "auto"
    vision: VisionForm = "weights"

    def __post_init__(self) -> None:
        for name, value in (("dp", self.dp), ("tp", self.tp), ("ep", 1 if self.ep is None else self.ep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed")
        for name, text, allowed in (
            ("attention", self.attention, get_args(AttentionForm)),
            ("exchange", self.exchange, get_args(ExchangeForm)),
            ("vision", self.vision, get_args(VisionForm)),
        ):
            if text not in allowed:
                raise ValueError(f"{name} is {text!r}; allowed: {', '.join(allowed)}")
        if self.attention == "tensor" and self.exchange == "all_to_all":
            raise ValueError(
                "exchange='all_to_all' sends each token from the one device that has it, and with attention='tensor' "
                "tp devices have it: give exchange='gather' or attention='data'"
            )

    @property
    def num_devices(self) -> int:
        return self.dp * self.tp

    @property
    def mesh_shape(self) -> tuple[int, int, int, int]:
        """Devices along each of `AXES`.

        The largest part that the tensor groups and the width groups have in common is an axis of both; what is left of
        the two then has no common factor, so that every divisor of dp x tp fits as ep.

        Raises:
          ValueError: If ep is not known yet, or is no divisor of dp x tp.
        """
        if self.ep is None or self.num_devices % self.ep:
            raise ValueError(f"ep is {self.ep}; a divisor of dp x tp = {self.num_devices} is needed")
        per_expert = self.num_devices // self.ep
        common = math.gcd(self.tp, per_expert)
        data_width = per_expert // common
        return self.dp // data_width, data_width, self.tp // common, common

    def __str__(self) -> str:
        return f"dp {self.dp}, tp {self.tp}" + (f", ep {self.ep}" if self.ep is not None else "")


def mesh_axes(logical: str, attention: AttentionForm = "data", vision: VisionForm = "weights") -> tuple[str, ...]:
    """The mesh axes that a logical axis lies on.

    Raises:
      ValueError: If the table has no such axis.
    """
    table = RULES | (TENSOR_ATTENTION if attention == "tensor" else {}) | (DATA_VISION if vision == "data" else {})
    if logical not in table:
        raise ValueError(f"there is no logical axis {logical!r}; the table has {', '.join(table)}")
    return table[logical]


def partition_spec(
    axes: Sequence[str | None], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> PartitionSpec:
    """The sharding of an array whose axes have these logical names; None for an axis that is whole everywhere.

    Raises:
      ValueError: If two axes would lie on the same axis of the mesh.
    """
    entries = [mesh_axes(name, attention, vision) if name is not None else () for name in axes]
    used = [axis for entry in entries for axis in entry]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(f"an array with the axes {tuple(axes)} would lie twice on {', '.join(twice)} of the mesh")
    return PartitionSpec(*(entry or None for entry in entries))


def parameter_spec(
    path: Sequence[str | int], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> PartitionSpec:
    """The sharding of the parameter at `path` of a `Step3` in the shape of `view_shape`; FP8 scales are cut the same way."""
    name = ".".join(str(part) for part in path)
    for end, axes in PARAMETERS.items():
        if name.endswith(end):
            spec = partition_spec(axes, attention, vision)
            return spec if any(spec) else PartitionSpec()
    return PartitionSpec()


def view_shape(
    path: Sequence[str | int], shape: tuple[int, ...], num_axes: int, vision: VisionConfig | None
) -> tuple[int, ...]:
    """The shape in which a parameter is sharded: its own, or with the tower's heads as an axis.

    Args:
      path: Of the parameter in a `Step3`.
      shape: Its shape in the checkpoint.
      num_axes: Axes that its sharding names, or that it has where it lies.
      vision: Sizes of the tower.
    """
    name = ".".join(str(part) for part in path)
    for end, (axis, parts) in HEAD_AXES.items():
        if name.endswith(end) and num_axes > len(shape) and vision is not None:
            return (*shape[:axis], parts, vision.num_attention_heads, vision.head_dim, *shape[axis + 1 :])
    return shape


def fit_parallel(parallel: Parallel, config: TextConfig, *, fp8_block: tuple[int, int] | None = None) -> Parallel:
    """`parallel` with its ep filled in, once it is known to divide the model.

    Args:
      parallel: What is asked for.
      config: The decoder's sizes.
      fp8_block: Rows and columns that share an FP8 scale, where weights stay in FP8: no block is cut.

    Raises:
      ValueError: If the model is not divided by it; the message names what is not, and the nearest that would do.
    """
    for candidate in _with_ep(parallel, config):
        if not find_problems(candidate, config, fp8_block):
            return candidate
    problems = find_problems(next(_with_ep(parallel, config)), config, fp8_block)
    nearest = nearest_parallel(parallel, config, fp8_block=fp8_block)
    raise ValueError(
        f"{parallel} does not divide the model: {'; '.join(problems)}. The nearest that does: {nearest} "
        f"({nearest.num_devices} devices)"
    )


def find_problems(parallel: Parallel, config: TextConfig, fp8_block: tuple[int, int] | None = None) -> list[str]:
    """What keeps `parallel`, whose ep is known, from dividing the model; an empty list if nothing does."""
    dp, tp, ep = parallel.dp, parallel.tp, parallel.ep or 1
    block = max(fp8_block) if fp8_block is not None else 1
    per_expert = parallel.num_devices // ep
    has_dense = len(config.moe_layers) < config.num_hidden_layers
    has_moe = bool(config.moe_layers)
    problems = []
    # Name, size, what cuts it, into how many parts, what a part must be a multiple of.
    cuts = [
        ("hidden_size", config.hidden_size, "tp", tp, 1),
        ("the width of all heads", config.query_size, "tp", tp, block),
        ("num_attention_heads", config.num_attention_heads, "tp", tp if parallel.attention == "tensor" else 1, 1),
        ("intermediate_size", config.intermediate_size, "tp", tp if has_dense else 1, block),
        ("share_expert_dim", config.share_expert_dim, "tp", tp if has_moe else 1, block),
    ]
    if has_moe and parallel.num_devices % ep:
        problems.append(f"ep = {ep} is no divisor of the dp x tp = {dp * tp} devices")
    elif has_moe:
        cuts += [
            ("moe_num_experts", config.moe_num_experts, "ep", ep, 1),
            ("moe_intermediate_size", config.moe_intermediate_size, "dp x tp / ep", per_expert, block),
        ]
    elif ep > 1:
        problems.append(f"ep is {ep}, and the model has no experts")
    for name, size, setting, parts, unit in cuts:
        # Whole, an array may end in a partial block.
        if parts > 1 and size % (parts * unit):
            of_blocks = f" of whole FP8 blocks of {unit}" if unit > 1 else ""
            problems.append(f"{name} is {size}, which {setting} = {parts} does not cut into equal parts{of_blocks}")
    return problems


def nearest_parallel(parallel: Parallel, config: TextConfig, *, fp8_block: tuple[int, int] | None = None) -> Parallel:
    """The setting that divides the model and is nearest to `parallel`: first in devices, then in dp, tp and ep."""
    wanted = parallel.num_devices

    def distance(other: Parallel) -> tuple[float, float]:
        ep = parallel.ep or other.ep or 1
        pairs = ((parallel.dp, other.dp), (parallel.tp, other.tp), (ep, other.ep or 1))
        return abs(math.log(other.num_devices / wanted)), sum(abs(math.log(a / b)) for a, b in pairs)

    # One device always does, and so never more than twice the devices have to be looked at.
    for count in sorted(range(1, 2 * wanted + 1), key=lambda count: (abs(math.log(count / wanted)), count)):
        fitting = [
            candidate
            for tp in _divisors(math.gcd(count, config.hidden_size))
            for ep in (_divisors(math.gcd(count, config.moe_num_experts)) if config.moe_layers else [1])
            for candidate in [dataclasses.replace(parallel, dp=count // tp, tp=tp, ep=ep)]
            if not find_problems(candidate, config, fp8_block)
        ]
        if fitting:
            return min(fitting, key=distance)
    raise ValueError("one device always divides a model")


def _with_ep(parallel: Parallel, config: TextConfig) -> Iterator[Parallel]:
    """The setting with each ep it may mean, the best first: reading few whole experts beats reading parts of many."""
    if parallel.ep is not None:
        yield parallel
    elif not config.moe_layers:
        yield dataclasses.replace(parallel, ep=1)
    else:
        most = math.gcd(parallel.num_devices, config.moe_num_experts)
        for ep in reversed(_divisors(most)):
            yield dataclasses.replace(parallel, ep=ep)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
