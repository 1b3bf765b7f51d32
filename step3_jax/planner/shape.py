"""The sizes of a model for the arithmetic of cost, and their files: `configs/planner/models/`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from step3_jax import resources
from step3_jax.config import PRESETS, ModelConfig
from step3_jax.nearest import describe_known
from step3_jax.planner.attention import AttentionGroup, CountRule, HeadAttention, read_group
from step3_jax.planner.data_file import Reader, read_yaml

# Bytes of a cached number, without scales. Four-bit storage is computed in 8 bits.
KV_DTYPE_BYTES: Mapping[str, float] = {"fp8": 1.0, "bfloat16": 2.0, "int4": 0.5}
_FOLDER = "configs/planner/models"
_STEP3_SOURCE = "the released config.json (configs/models)"


@dataclasses.dataclass(frozen=True)
class FfnShape:
    """Gated feed-forward layers, with three matrices each.

    Attributes:
      num_moe_layers: Layers with a mixture of experts.
      num_dense_layers: Layers without one.
      num_experts: Routed experts of a layer.
      top_k: Routed experts per token.
      num_shared_experts: Experts for every token.
      expert_width: Inner width of a routed expert.
      shared_width: Inner width of a shared one.
      dense_width: Inner width of a dense layer.
    """

    num_moe_layers: int
    num_dense_layers: int
    num_experts: int = 0
    top_k: int = 0
    num_shared_experts: int = 0
    expert_width: int = 0
    shared_width: int = 0
    dense_width: int = 0


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model as the planner sees it, without vision.

    Attributes:
      name: Name of its file, or of the configuration.
      printed_name: Name for people.
      num_layers: All layers.
      hidden_size: Model width.
      attention: Groups of layers with the same attention design.
      ffn: The feed-forward layers.
      vocab_size: Rows of the embedding and of the head.
      max_context_tokens: Positions of the model; None if its file does not say.
      source: The source of the sizes.
      inferred: Sizes that are not in any file, and why they are assumed; empty for none.
    """

    name: str
    printed_name: str
    num_layers: int
    hidden_size: int
    attention: tuple[AttentionGroup, ...]
    ffn: FfnShape
    vocab_size: int
    max_context_tokens: int | None = None
    source: str = ""
    inferred: str = ""

    @classmethod
    def of_config(cls, config: ModelConfig, name: str = "step3") -> ModelShape:
        """The shape of a model of Step3's form.

        Args:
          config: Its configuration.
          name: Its name.
        """
        text = config.text
        group = HeadAttention(
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_attention_groups,
            head_dim=text.head_dim,
            query_rank=text.share_q_dim,
        )
        num_moe = len(text.moe_layers)
        ffn = FfnShape(
            num_moe_layers=num_moe,
            num_dense_layers=text.num_hidden_layers - num_moe,
            num_experts=text.moe_num_experts,
            top_k=text.moe_top_k,
            num_shared_experts=1,
            expert_width=text.moe_intermediate_size,
            shared_width=text.share_expert_dim,
            dense_width=text.intermediate_size,
        )
        return cls(
            name=name,
            printed_name="Step-3" if name in ("step3", "step3-fp8") else name,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            attention=(group,),
            ffn=ffn,
            vocab_size=text.vocab_size,
            max_context_tokens=text.max_position_embeddings,
            source=_STEP3_SOURCE,
        )

    @property
    def design(self) -> str:
        """Attention design of the model; "hybrid" if layers differ."""
        designs = {group.design for group in self.attention}
        return designs.pop() if len(designs) == 1 else "hybrid"

    @property
    def active_share(self) -> float:
        """Share of the experts that a token uses, including the shared ones; 1 for a dense model.

        For Step3 (3 + 1) / (48 + 1), the sparsity of the report's section 5.4.
        """
        ffn = self.ffn
        if not ffn.num_moe_layers:
            return 1.0
        return (ffn.top_k + ffn.num_shared_experts) / (ffn.num_experts + ffn.num_shared_experts)

    def kv_bytes_held(self, context_tokens: float, kv_dtype: str = "fp8") -> float:
        """Bytes of cache of one sequence in all layers, without scales."""
        size = kv_element_bytes(kv_dtype)
        return sum(group.kv_bytes_held(context_tokens, size) for group in self.attention)

    def kv_bytes_read(self, context_tokens: float, kv_dtype: str = "fp8") -> float:
        """Bytes of cache that one decoded token moves in all layers, without scales."""
        size = kv_element_bytes(kv_dtype)
        return sum(group.kv_bytes_read(context_tokens, size) for group in self.attention)

    def attention_flops(self, context_tokens: float, rule: CountRule = "exact") -> float:
        """FLOPs of scores and values of one decoded token in all layers."""
        return sum(group.flops(context_tokens, rule) for group in self.attention)

    def projection_weights(self) -> int:
        """Weights of the matrices before and after attention, in all layers."""
        return sum(group.projection_weights(self.hidden_size) for group in self.attention)

    def projection_flops(self) -> float:
        """FLOPs of these matrices for one token."""
        return 2.0 * self.projection_weights()

    def ffn_active_weights(self) -> int:
        """Weights of the feed-forward layers that one token uses, without the router."""
        ffn = self.ffn
        moe = ffn.top_k * ffn.expert_width + ffn.num_shared_experts * ffn.shared_width
        return 3 * self.hidden_size * (ffn.num_moe_layers * moe + ffn.num_dense_layers * ffn.dense_width)

    def ffn_flops(self) -> float:
        """FLOPs of the feed-forward layers for one token."""
        return 2.0 * self.ffn_active_weights()

    def ffn_weights_read(self, num_tokens: float) -> float:
        """Weights of the feed-forward layers that a batch of tokens reads, if each chooses its experts at random.

        Args:
          num_tokens: Tokens that pass one copy of the experts together.
        """
        ffn = self.ffn
        moe = float(ffn.num_shared_experts * ffn.shared_width)
        if ffn.num_experts:
            touched = ffn.num_experts * (1 - (1 - ffn.top_k / ffn.num_experts) ** num_tokens)
            moe += touched * ffn.expert_width
        return 3 * self.hidden_size * (ffn.num_moe_layers * moe + ffn.num_dense_layers * ffn.dense_width)

    def weights(self) -> dict[str, int]:
        """All weights by part; norms and routers are left out."""
        ffn, matrix = self.ffn, 3 * self.hidden_size
        parts = {
            "attention": self.projection_weights(),
            "dense layers": matrix * ffn.num_dense_layers * ffn.dense_width,
            "shared experts": matrix * ffn.num_moe_layers * ffn.num_shared_experts * ffn.shared_width,
            "routed experts": matrix * ffn.num_moe_layers * ffn.num_experts * ffn.expert_width,
            "embedding and head": 2 * self.vocab_size * self.hidden_size,
        }
        return {name: size for name, size in parts.items() if size}


def kv_element_bytes(kv_dtype: str) -> float:
    """Bytes of one cached number.

    Raises:
      ValueError: If the dtype is not one of `KV_DTYPE_BYTES`.
    """
    if kv_dtype not in KV_DTYPE_BYTES:
        raise ValueError(f"no KV dtype {kv_dtype}{describe_known(kv_dtype, KV_DTYPE_BYTES)}")
    return KV_DTYPE_BYTES[kv_dtype]


def list_shapes() -> list[str]:
    """Names of the shipped models: Step3's configurations, then the data files."""
    return [*PRESETS, *sorted(file.stem for file in resources.find(_FOLDER).glob("*.yaml"))]


def load_shape(name: str) -> ModelShape:
    """The shape of a model.

    Args:
      name: One of `list_shapes` (underscores may replace hyphens), the path of a YAML file in the format of
        `configs/planner/models/`, or a config.json of Step3's form or its folder.

    Raises:
      ValueError: If there is no such model, or the file is wrong; the message names file and key.
    """
    path = pathlib.Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _read_shape(path)
    if path.is_file() or (path.is_dir() and (path / "config.json").is_file()):
        return dataclasses.replace(
            ModelShape.of_config(ModelConfig.load(path), (path if path.is_dir() else path.parent).resolve().name),
            source=str(path),
        )
    known, wanted = list_shapes(), name.lower().replace("_", "-")
    if wanted in PRESETS:
        return ModelShape.of_config(ModelConfig.preset(wanted), wanted)
    if wanted in known:
        return _read_shape(resources.find(f"{_FOLDER}/{wanted}.yaml"))
    raise ValueError(
        f"no model {name}{describe_known(wanted, known)}; or give a YAML file of that form, or a config.json of Step3's form"
    )


def _read_shape(path: pathlib.Path) -> ModelShape:
    reader = Reader(read_yaml(path), str(path))
    attention = tuple(read_group(one) for one in reader.sections("attention"))
    ffn = _read_ffn(reader.section("ffn"))
    shape = ModelShape(
        name=path.stem,
        printed_name=reader.text("printed_name", path.stem),
        num_layers=reader.whole("layers"),
        hidden_size=reader.whole("hidden_size"),
        attention=attention,
        ffn=ffn,
        vocab_size=reader.whole("vocab_size"),
        max_context_tokens=reader.whole("max_context_tokens") if reader.has("max_context_tokens") else None,
        source=reader.text("source", str(path)),
        inferred=reader.text("inferred", ""),
    )
    reader.check_all_read()
    for what, count in (
        ("attention groups", sum(group.num_layers for group in attention)),
        ("ffn.moe_layers and ffn.dense_layers", ffn.num_moe_layers + ffn.num_dense_layers),
    ):
        if count != shape.num_layers:
            raise ValueError(f"{path}: {what} have {count} layers in all, but layers is {shape.num_layers}")
    return shape


def _read_ffn(reader: Reader) -> FfnShape:
    ffn = FfnShape(
        num_moe_layers=reader.count("moe_layers"),
        num_dense_layers=reader.count("dense_layers"),
        num_experts=reader.count("experts"),
        top_k=reader.count("top_k"),
        num_shared_experts=reader.count("shared_experts"),
        expert_width=reader.count("expert_width"),
        shared_width=reader.count("shared_width"),
        dense_width=reader.count("dense_width"),
    )
    reader.check_all_read()
    needed: Sequence[tuple[str, int]] = ()
    if ffn.num_moe_layers:
        needed = (("experts", ffn.num_experts), ("top_k", ffn.top_k), ("expert_width", ffn.expert_width))
    if ffn.num_dense_layers:
        needed = (*needed, ("dense_width", ffn.dense_width))
    for key, value in needed:
        if not value:
            raise ValueError(f"{reader.where}: {key} is 0 or missing, but there are layers that need it")
    if ffn.top_k > ffn.num_experts:
        raise ValueError(f"{reader.where}: top_k is {ffn.top_k}, more than the {ffn.num_experts} experts")
    return ffn
