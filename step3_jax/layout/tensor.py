"""ONE table: each tensor's released name, its path in our modules, its shape, and whether the FP8 release quantises it.

Shapes are written in the project's alphabet (`layers/attention.py`); the rest: I dense FFN width · G shared expert width ·
Q all query heads · W tower width · M tower MLP width · O width of the first convolution · C colours · Z patch side ·
U rows of the position table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from step3_jax.config import ModelConfig

Path = tuple[str | int, ...]


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      released: Name in the released checkpoint; `{}` stands for the layer's number.
      ours: Path in `Step3`, dotted.
      shape: One symbol per axis.
      layers: Which layers have it: "text", "dense", "moe", "tower"; "" if it is outside the layers.
      is_fp8: Whether the FP8 release quantises it.
    """

    released: str
    ours: str
    shape: str
    layers: str = ""
    is_fp8: bool = False

    @property
    def is_vision(self) -> bool:
        """Whether it belongs to the tower or to the projector."""
        return self.ours.startswith(("vision.", "projector."))

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, of one layer in the BF16 layout; `symbols` come from `symbol_sizes`."""
        return tuple(_size(symbol, symbols) for symbol in self.shape.split())


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


def list_rows(config: ModelConfig) -> Iterator[tuple[Row, list[int]]]:
    """The rows that a model has, with the layers that have them; [0] for tensors outside the layers."""
    text, vision = config.text, config.vision
    every = range(text.num_hidden_layers)
    layers: dict[str, list[int]] = {
        "": [0],
        "text": list(every),
        "dense": [layer for layer in every if not text.is_moe_layer(layer)],
        "moe": [layer for layer in every if text.is_moe_layer(layer)],
        "tower": [] if vision is None else list(range(vision.num_hidden_layers)),
    }
    for row in TABLE:
        has_bias = config.projector_bias or row.released != "vit_large_projector.bias"
        if has_bias and (vision is not None or not row.is_vision) and layers[row.layers]:
            yield row, layers[row.layers]


def list_tensors(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Every tensor of a model as its row and its layer number, layer by layer in file order."""
    for stack, group in itertools.groupby(list_rows(config), key=lambda found: _stack(found[0])):
        rows = list(group)
        if stack is None:
            yield from ((row, 0) for row, _ in rows)
            continue
        for layer in range(1 + max(max(layers) for _, layers in rows)):
            yield from ((row, layer) for row, layers in rows if layer in layers)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> tuple[int, ...]:
    """Shape of the FP8 scales that belong to an array of `shape`."""
    if len(shape) < 2:
        raise ValueError(f"shape {shape} has fewer than two axes; block scaling needs two")
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _stack(row: Row) -> str | None:
    """Which stack of layers a row belongs to."""
    return {"": None, "tower": "tower"}.get(row.layers, "decoder")


def symbol_sizes(config: ModelConfig) -> dict[str, int]:
    """The values of the symbols of `Row.shape` in a model."""
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


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    """ "D" -> 7168, "3" -> 3, "3W" -> 3 * 1792."""
    digits = symbol.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    letter = symbol[len(digits) :]
    return int(digits or 1) * (sizes[letter] if letter else 1)
