"""The two names of each tensor, the released one and ours, from the one table in `layout/tensor.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from flax import nnx

from step3_jax.config import ModelConfig
from step3_jax.layout.tensor import TABLE, Path, Row, list_tensors, scale_shape, symbol_sizes

SCALE_SUFFIX = "_scale_inv"
VISION_PREFIXES = ("vision_model.", "vit_")
# In the paths of linear weights that are never quantised.
_LINEAR_ENDINGS = (
    "embed_tokens.weight",
    "lm_head.weight",
    "qkv_proj.weight",
    "out_proj.weight",
    "fc1.weight",
    "fc2.weight",
    "vit_large_projector.weight",
)

_BY_RELEASED = {row.released: row for row in TABLE}
_BY_OURS = {row.ours: row for row in TABLE}
_NUMBER = re.compile(r"\.(0|[1-9][0-9]*)\.")


def released_name(path: Path) -> str:
    """The released name of the parameter at `path`, as `nnx.to_flat_state` gives it.

    Raises:
      ValueError: If `path` is not a parameter of `Step3`.
    """
    row, layer = _look_up(_BY_OURS, ".".join(str(part) for part in path))
    return row.released.format(layer)


def our_path(name: str) -> Path:
    """The path in `Step3` of the released tensor `name` (scales of FP8 tensors have none).

    Raises:
      ValueError: If `name` is not a tensor of the released model.
    """
    row, layer = _look_up(_BY_RELEASED, name)
    return tuple(int(part) if part.isdigit() else part for part in row.ours.format(layer).split("."))


def is_fp8_tensor(name: str) -> bool:
    """Whether the FP8 release quantises the tensor `name`: every linear weight of the decoder except router and head."""
    return _look_up(_BY_RELEASED, name)[0].is_fp8


def is_linear_tensor(name: str) -> bool:
    """Whether only a linear layer or the embedding uses the tensor `name`."""
    row = _look_up(_BY_RELEASED, name)[0]
    return row.is_fp8 or row.ours.endswith(_LINEAR_ENDINGS)


def axis_symbols(name: str) -> tuple[str, ...]:
    """The symbols of a released tensor's axes, from the table: ("E", "F", "D") for `moe.gate_proj`."""
    return tuple(_look_up(_BY_RELEASED, name)[0].shape.split())


def parameters_of(model: nnx.Module) -> dict[Path, nnx.Param]:
    """The parameters of a model by path; setting the value of one sets it in the model."""
    return {cast(Path, path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def scale_name(name: str) -> str:
    """Name of the scales that belong to an FP8 tensor. They multiply, despite the "inv"."""
    return name + SCALE_SUFFIX


def is_vision_tensor(name: str) -> bool:
    """Whether `name` belongs to the tower or to the projector."""
    return name.startswith(VISION_PREFIXES)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the BF16 layout with its shape, layer by layer in file order. Without `vision`: the text part."""
    symbols = symbol_sizes(config)
    return {row.released.format(layer): row.sizes(symbols) for row, layer in list_tensors(config)}


def expected_scales(config: ModelConfig, block: tuple[int, int] = (128, 128)) -> dict[str, tuple[int, ...]]:
    """The additional scale tensors of the FP8 layout, with their shapes."""
    shapes = expected_tensors(config)
    return {scale_name(name): scale_shape(shape, block) for name, shape in shapes.items() if is_fp8_tensor(name)}


def _look_up(table: Mapping[str, Row], name: str) -> tuple[Row, str]:
    """The row of `name` and its layer number ("" outside the layers)."""
    match = _NUMBER.search(name)
    pattern = f"{name[: match.start()]}.{{}}.{name[match.end() :]}" if match else name
    row = table.get(pattern)
    if row is None or (match is None) != (row.layers == ""):
        raise ValueError(f"{name} is not a parameter of Step3; step3_jax/layout/tensor.py lists them")
    return row, match[1] if match else ""
