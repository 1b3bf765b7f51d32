"""How a model is spread over devices: the setting, why it does not divide a model, and the nearest one that does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, get_args

from step3_jax.config import TextConfig

AttentionForm = Literal["data", "tensor"]
ExchangeForm = Literal["auto", "gather", "all_to_all"]
VisionForm = Literal["weights", "data"]
# Which part of a model devices hold: all of it, or with attention and FFN on separate devices one of the two.
RoleName = Literal["both", "attention", "ffn"]
BOTH: RoleName = "both"
ATTENTION: RoleName = "attention"
FFN: RoleName = "ffn"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a model, or a role's part of it, is spread over dp x tp devices.

    Attributes:
      dp: Groups of devices, each with one copy of the weights outside the routed experts.
      tp: Devices of such a group; these weights are sharded across them.
      ep: Groups that the routed experts are sharded across, a divisor of dp x tp; the width of each expert is sharded
        within such a group. None takes the most that the model allows.
      attention: "data": every device has its own sequences. "tensor": the query heads are sharded across the tp devices
        of a group, and each has a copy of the group's KV cache.
      exchange: How tokens reach their experts. "gather": every device gets all tokens, and the reduce-scatter that takes
        them back sums the experts' outputs. "all_to_all": tokens go only where one of their experts is.
        "auto": the latter if the experts are spread over several hosts.
      vision: "weights": vision tower and projector are sharded across the tp devices of a group, which encode each image
        together. "data": every device has all of them, and its own images.
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
                "exchange='all_to_all' sends each token from the one device that has it, but with attention='tensor' "
                "tp devices have it: give exchange='gather' or attention='data'"
            )

    @property
    def num_devices(self) -> int:
        return self.dp * self.tp

    @property
    def expert_groups(self) -> int:
        """The value of ep.

        Raises:
          ValueError: If it is not known yet, or is not a divisor of dp x tp.
        """
        if self.ep is None or self.num_devices % self.ep:
            raise ValueError(f"ep is {self.ep}; a divisor of dp x tp = {self.num_devices} is needed")
        return self.ep

    @property
    def expert_width_parts(self) -> int:
        """Devices that the width of each routed expert is sharded across.

        Raises:
          ValueError: As `expert_groups`.
        """
        return self.num_devices // self.expert_groups

    @property
    def mesh_shape(self) -> tuple[int, int, int, int]:
        """Devices along each of `table.AXES`.

        The greatest common divisor of the tensor groups and the width groups is an axis of both; the rest of the
        two then has no common factor, so that every divisor of dp x tp works as ep.

        Raises:
          ValueError: As `expert_groups`.
        """
        common = math.gcd(self.tp, self.expert_width_parts)
        data_width = self.expert_width_parts // common
        return self.dp // data_width, data_width, self.tp // common, common

    def __str__(self) -> str:
        return f"dp {self.dp}, tp {self.tp}" + (f", ep {self.ep}" if self.ep is not None else "")


def list_parallels(num_devices: int) -> list[Parallel]:
    """Every way to divide this many devices, by tp and then by ep; does not check whether it divides a model."""
    parts = _divisors(num_devices)
    return [Parallel(num_devices // tp, tp, ep) for tp in parts for ep in parts]


def fit_parallel(
    parallel: Parallel, config: TextConfig, *, fp8_block: tuple[int, int] | None = None, role: RoleName = BOTH
) -> Parallel:
    """`parallel` with its ep filled in, after checking that it divides the model.

    Args:
      parallel: The requested setting.
      config: The decoder's sizes.
      fp8_block: Rows and columns that share an FP8 scale, where weights stay in FP8: no block is cut.
      role: The part of the model that the devices hold.

    Raises:
      ValueError: If it does not divide the model; the message says why, and names the nearest setting that does.
    """
    for candidate in _with_ep(parallel, config):
        if not find_problems(candidate, config, fp8_block, role):
            return candidate
    problems = find_problems(next(_with_ep(parallel, config)), config, fp8_block, role)
    nearest = nearest_parallel(parallel, config, fp8_block=fp8_block, role=role)
    raise ValueError(
        f"{parallel} does not divide the model: {'; '.join(problems)}. The nearest that does: {nearest} "
        f"({nearest.num_devices} devices)"
    )


def find_problems(
    parallel: Parallel, config: TextConfig, fp8_block: tuple[int, int] | None = None, role: RoleName = BOTH
) -> list[str]:
    """Why `parallel`, whose ep is known, does not divide a role's part of the model.

    Args:
      parallel: The setting.
      config: The decoder's sizes.
      fp8_block: As for `fit_parallel`.
      role: The part of the model that the devices hold. "ffn" ignores embedding, attention and head, and "attention"
        the layers' dense and expert weights.

    Returns:
      One line each; empty if nothing does.
    """
    tp, ep = parallel.tp, parallel.ep or 1
    block = max(fp8_block) if fp8_block is not None else 1
    has_moe = bool(config.moe_layers)
    has_dense = len(config.moe_layers) < config.num_hidden_layers
    problems = []
    # Name, size, the setting that divides it, the number of parts, and what a part must be a multiple of.
    cuts: list[tuple[str, int, str, int, int]] = []
    if role != FFN:
        cuts += [
            ("hidden_size", config.hidden_size, "tp", tp, 1),
            ("the width of all heads", config.query_size, "tp", tp, block),
            ("num_attention_heads", config.num_attention_heads, "tp", tp if parallel.attention == "tensor" else 1, 1),
        ]
    if role != ATTENTION:
        cuts += [
            ("intermediate_size", config.intermediate_size, "tp", tp if has_dense else 1, block),
            ("share_expert_dim", config.share_expert_dim, "tp", tp if has_moe else 1, block),
        ]
        if has_moe and parallel.num_devices % ep:
            problems.append(f"ep = {ep} is not a divisor of the dp x tp = {parallel.num_devices} devices")
        elif has_moe:
            width_parts = parallel.num_devices // ep
            cuts += [
                ("moe_num_experts", config.moe_num_experts, "ep", ep, 1),
                ("moe_intermediate_size", config.moe_intermediate_size, "dp x tp / ep", width_parts, block),
            ]
        elif ep > 1:
            problems.append(f"ep is {ep}, but the model has no experts")
    for name, size, setting, parts, unit in cuts:
        # An unsharded array may end in a partial block.
        if parts > 1 and size % (parts * unit):
            of_blocks = f" of whole FP8 blocks of {unit}" if unit > 1 else ""
            problems.append(f"{name} is {size}, which {setting} = {parts} does not cut into equal parts{of_blocks}")
    return problems


def nearest_parallel(
    parallel: Parallel, config: TextConfig, *, fp8_block: tuple[int, int] | None = None, role: RoleName = BOTH
) -> Parallel:
    """The setting that divides the model and is nearest to `parallel`: first in devices, then in dp, tp and ep."""
    wanted = parallel.num_devices

    def distance(other: Parallel) -> tuple[float, float]:
        ep = parallel.ep or other.expert_groups
        pairs = ((parallel.dp, other.dp), (parallel.tp, other.tp), (ep, other.expert_groups))
        return abs(math.log(other.num_devices / wanted)), sum(abs(math.log(a / b)) for a, b in pairs)

    # One device always divides it, so at most twice the devices have to be searched.
    for count in sorted(range(1, 2 * wanted + 1), key=lambda count: (abs(math.log(count / wanted)), count)):
        candidates = [
            dataclasses.replace(parallel, dp=one.dp, tp=one.tp, ep=one.ep)
            for one in list_parallels(count)
            if config.moe_layers or one.ep == 1
        ]
        fitting = [one for one in candidates if not find_problems(one, config, fp8_block, role)]
        if fitting:
            return min(fitting, key=distance)
    raise ValueError("one device always divides a model")


def _with_ep(parallel: Parallel, config: TextConfig) -> Iterator[Parallel]:
    """The setting with each possible ep, the best first: reading few whole experts beats reading parts of many."""
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
