"""ONE table: each tensor's released name, its place in our modules, its shape, and whether the FP8 release quantises it.

`{}` stands for the layer's number. Shapes are written in the project's alphabet (`layers/attention.py`); the rest:
I dense FFN width · G shared expert width · Q all query heads · W tower width · M tower MLP width · O width of the first
convolution · C colours · Z patch side · U rows of the position table.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple, cast

from flax import nnx

from step3_jax.config import ModelConfig
from step3_jax.quant import scale_shape

Path = tuple[str | int, ...]

SCALE_SUFFIX = "_scale_inv"
VISION_PREFIXES = ("vision_model.", "vit_")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      released: Name in the released checkpoint.
      ours: Place in `Step3`, dotted.
      shape: One symbol an axis.
      layers: Which layers have it: "text", "dense", "moe", "tower"; "" if it stands outside the layers.
      is_fp8: Whether the FP8 release quantises it.
    """

    released: str
    ours: str
    shape: str
    layers: str = ""
    is_fp8: bool = False


TABLE = (
    Row("model.embed_tokens.weight", "text.embed_tokens.weight", "V D"),
    *(
        Row(f"model.layers.{{}}.{released}", f"text.layers.{{}}.{ours}", shape, layers, is_fp8)
        for released, ours, shape, layers, is_fp8 in (
            ("input_layernorm.weight", "attention.input_layernorm.weight", "D", "text", False),
            ("self_attn.q_proj.weight", "attention.self_attn.q_proj.weight", "R D", "text", True),
            ("self_attn.k_proj.weight", "attention.self_attn.k_proj.weight", "K D", "text", True),
            ("self_attn.v_proj.weight", "attention.self_attn.v_proj.weight", "K D", "text", True),
            ("self_attn.inter_norm.weight", "attention.self_attn.inter_norm.weight", "R", "text", False),
            ("self_attn.wq.weight", "attention.self_attn.wq.weight", "Q R", "text", True),
            ("self_attn.o_proj.weight", "attention.self_attn.o_proj.weight", "D Q", "text", True),
            ("post_attention_layernorm.weight", "attention.post_attention_layernorm.weight", "D", "text", False),
            ("mlp.gate_proj.weight", "ffn.mlp.gate_proj.weight", "I D", "dense", True),
            ("mlp.up_proj.weight", "ffn.mlp.up_proj.weight", "I D", "dense", True),
            ("mlp.down_proj.weight", "ffn.mlp.down_proj.weight", "D I", "dense", True),
            ("moe.gate.weight", "attention.router.weight", "E D", "moe", False),
            ("moe.gate_proj.weight", "ffn.moe.gate_proj", "E F D", "moe", True),
            ("moe.up_proj.weight", "ffn.moe.up_proj", "E F D", "moe", True),
            ("moe.down_proj.weight", "ffn.moe.down_proj", "E D F", "moe", True),
            ("share_expert.gate_proj.weight", "ffn.share_expert.gate_proj.weight", "G D", "moe", True),
            ("share_expert.up_proj.weight", "ffn.share_expert.up_proj.weight", "G D", "moe", True),
            ("share_expert.down_proj.weight", "ffn.share_expert.down_proj.weight", "D G", "moe", True),
        )
    ),
    Row("model.norm.weight", "text.norm.weight", "D"),
    Row("lm_head.weight", "text.lm_head.weight", "V D"),
    Row("vision_model.embeddings.class_embedding", "vision.embeddings.class_embedding", "1 W"),
    Row("vision_model.embeddings.patch_embedding.weight", "vision.embeddings.weight", "W C Z Z"),
    Row("vision_model.embeddings.patch_embedding.bias", "vision.embeddings.bias", "W"),
    Row("vision_model.embeddings.position_embedding.weight", "vision.embeddings.position_embedding", "U W"),
    *(
        Row(f"vision_model.transformer.layers.{{}}.{name}", f"vision.layers.{{}}.{name}", shape, "tower")
        for name, shape in (
            ("self_attn.qkv_proj.weight", "3W W"),
            ("self_attn.qkv_proj.bias", "3W"),
            ("self_attn.out_proj.weight", "W W"),
            ("self_attn.out_proj.bias", "W"),
            ("layer_norm1.weight", "W"),
            ("layer_norm1.bias", "W"),
            ("mlp.fc1.weight", "M W"),
            ("mlp.fc1.bias", "M"),
            ("mlp.fc2.weight", "W M"),
            ("mlp.fc2.bias", "W"),
            ("layer_norm2.weight", "W"),
            ("layer_norm2.bias", "W"),
        )
    ),
    Row("vit_downsampler.weight", "projector.vit_downsampler.weight", "O W 2 2"),
    Row("vit_downsampler.bias", "projector.vit_downsampler.bias", "O"),
    Row("vit_downsampler2.weight", "projector.vit_downsampler2.weight", "2O O 3 3"),
    Row("vit_downsampler2.bias", "projector.vit_downsampler2.bias", "2O"),
    Row("vit_large_projector.weight", "projector.vit_large_projector.weight", "D 2O"),
    # The released model has none (`projector_bias` false), but the configuration allows it.
    Row("vit_large_projector.bias", "projector.vit_large_projector.bias", "D"),
)

_BY_RELEASED = {row.released: row for row in TABLE}
_BY_OURS = {row.ours: row for row in TABLE}
_NUMBER = re.compile(r"\.(0|[1-9][0-9]*)\.")


class ParameterCount(NamedTuple):
    """Numbers of parameters; `total` is the sum of the others."""

    text: int
    vision: int
    projector: int
    total: int


def released_name(path: Path) -> str:
    """The released name of the parameter at `path`, as `nnx.to_flat_state` gives it.

    Raises:
      ValueError: If `path` is no parameter of `Step3`.
    """
    row, layer = _look_up(_BY_OURS, ".".join(str(part) for part in path))
    return row.released.format(layer)


def our_path(name: str) -> Path:
    """The place in `Step3` of the released tensor `name` (scales of FP8 tensors have none of their own).

    Raises:
      ValueError: If `name` is no tensor of the released model.
    """
    row, layer = _look_up(_BY_RELEASED, name)
    return tuple(int(part) if part.isdigit() else part for part in row.ours.format(layer).split("."))


def is_fp8_tensor(name: str) -> bool:
    """Whether the FP8 release quantises the tensor `name`: every linear weight of the decoder, save router and head."""
    return _look_up(_BY_RELEASED, name)[0].is_fp8


def axis_symbols(name: str) -> tuple[str, ...]:
    """The symbols of a released tensor's axes, as the table has them: ("E", "F", "D") for `moe.gate_proj`."""
    return tuple(_look_up(_BY_RELEASED, name)[0].shape.split())


def parameters_of(model: nnx.Module) -> dict[Path, nnx.Param]:
    """The parameters of a model by their path; setting the value of one sets it in the model."""
    return {cast(Path, path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def scale_name(name: str) -> str:
    """Name of the scales that belong to an FP8 tensor. They multiply, in spite of the "inv"."""
    return name + SCALE_SUFFIX


def is_vision_tensor(name: str) -> bool:
    """Whether `name` belongs to the tower or to the projector."""
    return name.startswith(VISION_PREFIXES)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the BF16 layout with its shape, layer by layer in file order. Without `vision`: the text part."""
    sizes = _symbols(config)
    return {
        row.released.format(layer): tuple(_size(symbol, sizes) for symbol in row.shape.split())
        for row, layer in _rows(config)
    }


def expected_scales(config: ModelConfig, block: tuple[int, int] = (128, 128)) -> dict[str, tuple[int, ...]]:
    """The scale tensors that the FP8 layout has besides, with their shapes."""
    shapes = expected_tensors(config)
    return {scale_name(name): scale_shape(shape, block) for name, shape in shapes.items() if is_fp8_tensor(name)}


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of each part; the released model has 320,969,912,832 (spec, section 2)."""
    counts = {"text": 0, "vision": 0, "projector": 0}
    for name, shape in expected_tensors(config).items():
        counts[str(our_path(name)[0])] += math.prod(shape)
    return ParameterCount(**counts, total=sum(counts.values()))


def _look_up(table: dict[str, Row], name: str) -> tuple[Row, str]:
    """The row of `name` and its layer number ("" outside the layers)."""
    match = _NUMBER.search(name)
    pattern = f"{name[: match.start()]}.{{}}.{name[match.end() :]}" if match else name
    row = table.get(pattern)
    if row is None or (match is None) != (row.layers == ""):
        raise ValueError(f"{name} is no parameter of Step3; step3_jax/checkpoint/names.py lists them")
    return row, match[1] if match else ""


def _rows(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Rows of the table with a layer number each: all rows of a layer stand together."""
    text = config.text
    num_tower_layers = config.vision.num_hidden_layers if config.vision is not None else 0
    layers = {
        "text": range(text.num_hidden_layers),
        "dense": set(range(text.num_hidden_layers)) - set(text.moe_layers),
        "moe": set(text.moe_layers),
        "tower": range(num_tower_layers),
    }
    for stack, group in itertools.groupby(TABLE, key=_stack):
        rows = list(group)
        if stack is None:
            yield from ((row, 0) for row in rows if _is_present(row, config))
            continue
        for layer in range(max(text.num_hidden_layers, num_tower_layers)):
            yield from ((row, layer) for row in rows if layer in layers[row.layers])


def _stack(row: Row) -> str | None:
    """Which stack of layers a row belongs to."""
    return {"": None, "tower": "tower"}.get(row.layers, "decoder")


def _is_present(row: Row, config: ModelConfig) -> bool:
    if row.released == "vit_large_projector.bias" and not config.projector_bias:
        return False
    return config.vision is not None or not is_vision_tensor(row.released)


def _symbols(config: ModelConfig) -> dict[str, int]:
    text, vision = config.text, config.vision
    sizes = {
        "V": text.vocab_size,
        "D": text.hidden_size,
        "R": text.share_q_dim,
        "K": text.head_dim,
        "Q": text.query_size,
        "I": text.intermediate_size,
        "E": text.moe_num_experts,
        "F": text.moe_intermediate_size,
        "G": text.share_expert_dim,
    }
    if vision is not None:
        sizes |= {
            "W": vision.hidden_size,
            "M": vision.intermediate_size,
            "O": vision.output_hidden_size,
            "C": vision.num_channels,
            "Z": vision.patch_size,
            "U": 1 + vision.grid**2,
        }
    return sizes


def _size(symbol: str, sizes: dict[str, int]) -> int:
    """ "D" -> 7168, "3" -> 3, "3W" -> 3 * 1792."""
    digits = symbol.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    letter = symbol[len(digits) :]
    return int(digits or 1) * (sizes[letter] if letter else 1)
