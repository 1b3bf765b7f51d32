"""The model's configuration: frozen dataclasses, read from and written to the released `config.json` layout."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from step3_jax import resources
from step3_jax.config_file import (
    check_fixed,
    check_layers,
    check_positive,
    parse_dtype,
    parse_layers,
    pick,
    rope_theta,
    section,
    typed,
    with_outer,
)
from step3_jax.stored_file import read_json_object

ARCHITECTURES = ("Step3VLForConditionalGeneration", "Step3vForConditionalGeneration", "Step3TextForCausalLM")
MODEL_TYPES = ("step3_vl", "step3_text")
DTYPES = ("float32", "bfloat16")
PRESETS = ("step3", "step3-fp8", "step3-tiny")

# The tower's LayerNorm epsilon is a constant of the vendor's code, whatever the file says.
VISION_NORM_EPS = 1e-6
# The class token comes four times, before the patches.
NUM_CLASS_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder. Defaults are the released 321B model's."""

    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 64
    num_attention_groups: int = 1
    head_dim: int = 256
    share_q_dim: int = 2048
    moe_num_experts: int = 48
    moe_top_k: int = 3
    moe_intermediate_size: int = 5120
    share_expert_dim: int = 5120
    moe_layers: tuple[int, ...] = tuple(range(4, 60))
    norm_expert_weight: bool = False
    vocab_size: int = 128815
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 65536

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "share_q_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            check_positive(f"text_config.{name}", getattr(self, name))
        check_layers("text_config", self.num_hidden_layers)
        if self.num_attention_groups != 1:
            raise ValueError(
                f"text_config.num_attention_groups is {self.num_attention_groups}: Step3's attention has one key/value "
                "head, so only 1 is allowed"
            )
        if self.head_dim % 2:
            raise ValueError(f"text_config.head_dim is {self.head_dim}: rotary embedding needs an even number")
        outside = [layer for layer in self.moe_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"text_config.moe_layers_enum names layers {outside}, but the model has layers 0.."
                f"{self.num_hidden_layers - 1}"
            )
        if self.moe_layers:
            for name in ("moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"):
                check_positive(f"text_config.{name}", getattr(self, name))
            if self.moe_top_k > self.moe_num_experts:
                raise ValueError(
                    f"text_config.moe_top_k is {self.moe_top_k}, more than the {self.moe_num_experts} experts"
                )
        if not self.rope_theta > 1 or not self.rms_norm_eps > 0:
            raise ValueError(
                f"text_config.rope_theta ({self.rope_theta}) must be above 1 and rms_norm_eps ({self.rms_norm_eps}) above 0"
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer`'s feed-forward part is a mixture of experts."""
        return layer in self.moe_layers

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TextConfig:
        """Reads the `text_config` part of a released `config.json`; missing keys take the released defaults."""
        picked = pick(cls, "text_config.", values, skip=("moe_layers", "max_position_embeddings"))
        check_fixed("text_config.", values)
        theta = rope_theta("text_config.", values)
        if theta is not None:
            picked["rope_theta"] = theta
        # The file spells it without the final s; `max_seq_len` is the same figure under another name.
        for name in ("max_position_embedding", "max_position_embeddings", "max_seq_len"):
            if values.get(name) is not None:
                picked["max_position_embeddings"] = typed(f"text_config.{name}", values[name], "int")
                break
        num_layers = int(picked.get("num_hidden_layers", cls.num_hidden_layers))  # type: ignore[call-overload]
        check_layers("text_config", num_layers)
        picked["moe_layers"] = parse_layers(values.get("moe_layers_enum"), num_layers)
        return cls(**picked)  # type: ignore[arg-type]

    def to_dict(self, dtype: str) -> dict[str, object]:
        """The `text_config` part of a released `config.json`."""
        values = dataclasses.asdict(self)
        values["moe_layers_enum"] = ",".join(str(layer) for layer in values.pop("moe_layers"))
        length = values.pop("max_position_embeddings")
        head = {"architectures": ["Step3TextForCausalLM"], "model_type": "step3_text"}
        return head | values | {"max_seq_len": length, "max_position_embedding": length, "torch_dtype": dtype}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. Defaults are the released model's."""

    hidden_size: int = 1792
    output_hidden_size: int = 4096
    image_size: int = 728
    intermediate_size: int = 15360
    num_attention_heads: int = 16
    num_hidden_layers: int = 63
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "hidden_act":
                check_positive(f"vision_config.{field.name}", getattr(self, field.name))
        check_layers("vision_config", self.num_hidden_layers)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config.hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision_config.image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})"
            )
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"vision_config.hidden_act is {self.hidden_act!r}; only 'quick_gelu' is known")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a whole image."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> VisionConfig:
        """Reads the `vision_config` part of a released `config.json`; missing keys take the released defaults."""
        return cls(**pick(cls, "vision_config.", values))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a block-FP8 checkpoint is quantised: one float32 scale for each block of the last two axes."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if self.quant_method != "fp8" or self.fmt not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(
                f"quantization_config has quant_method {self.quant_method!r} and fmt {self.fmt!r}; "
                "only block-FP8 is known: 'fp8' with 'e4m3'"
            )
        if self.activation_scheme != "dynamic":
            raise ValueError(
                f"quantization_config.activation_scheme is {self.activation_scheme!r}; only 'dynamic' is known"
            )
        if len(self.weight_block_size) != 2 or any(size <= 0 for size in self.weight_block_size):
            raise ValueError(
                f"quantization_config.weight_block_size is {self.weight_block_size}; two positive numbers are needed"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> QuantConfig:
        """Reads `quantization_config`; ignores keys that this project does not use."""
        picked = pick(cls, "quantization_config.", values, skip=("weight_block_size",))
        block = values.get("weight_block_size")
        if block is not None:
            if not isinstance(block, list | tuple) or [type(size) for size in block] != [int, int]:
                raise ValueError(f"quantization_config.weight_block_size is {block!r}; two numbers are needed")
            picked["weight_block_size"] = tuple(block)
        return cls(**picked)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model. `vision` is None for a text-only model."""

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    vision: VisionConfig | None = dataclasses.field(default_factory=VisionConfig)
    quantization: QuantConfig | None = None
    dtype: str = "bfloat16"
    image_token_id: int = 128001
    image_token_len: int = 169
    patch_token_len: int = 81
    understand_projector_stride: int = 2
    projector_bias: bool = False
    im_start_token: str = "<im_start>"
    im_patch_token: str = "<im_patch>"
    im_end_token: str = "<im_end>"
    bos_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 128805

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"torch_dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.vision is None:
            return
        check_positive("understand_projector_stride", self.understand_projector_stride)
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id}, outside the vocabulary of {self.text.vocab_size}"
            )
        if self.vision.grid < 2 or self.num_image_tokens(self.vision.grid) != self.image_token_len:
            raise ValueError(
                f"image_token_len is {self.image_token_len}, but an image of {self.vision.image_size} with patches of "
                f"{self.vision.patch_size} and projector stride {self.understand_projector_stride} gives "
                f"{self.num_image_tokens(self.vision.grid)} tokens"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text; empty if the file names none."""
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def num_image_tokens(self, grid: int) -> int:
        """Tokens that an image of `grid` x `grid` patches becomes after the two convolutions."""
        side = (grid - 2) // self.understand_projector_stride + 1
        return ((side - 1) // 2 + 1) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModelConfig:
        """Reads a released `config.json` (or a text-only one, whose keys are at the top level).

        Raises:
          ValueError: For another architecture, or an impossible number; the message names the key.
        """
        model_type = values.get("model_type")
        architectures = values.get("architectures") or []
        if not isinstance(architectures, Sequence) or isinstance(architectures, str):
            raise ValueError(f"architectures is {architectures!r}; a list of names is needed")
        unknown = [name for name in architectures if name not in ARCHITECTURES]
        if model_type not in MODEL_TYPES or unknown:
            raise ValueError(
                f"not a Step3 model: model_type {model_type!r}, architectures {list(architectures)}; allowed: model_type "
                f"{' or '.join(MODEL_TYPES)}, architectures among {', '.join(ARCHITECTURES)}"
            )
        is_text_only = model_type == "step3_text"
        text = values if is_text_only else section(values, "text_config")
        if not is_text_only:
            text = with_outer(text, values, {field.name for field in dataclasses.fields(TextConfig)})
        vision = None if is_text_only else values.get("vision_config")
        quantization = values.get("quantization_config")
        picked = pick(cls, "", values, skip=("text", "vision", "quantization", "dtype", "eos_token_id"))
        picked["text"] = TextConfig.from_dict(text)
        picked["vision"] = VisionConfig.from_dict(section(values, "vision_config")) if vision is not None else None
        if quantization:
            picked["quantization"] = QuantConfig.from_dict(section(values, "quantization_config"))
        dtype = next((part[key] for part in (values, text) for key in ("torch_dtype", "dtype") if part.get(key)), None)
        if dtype is not None:
            picked["dtype"] = parse_dtype(dtype)
        eos = values["eos_token_id"] if values.get("eos_token_id") is not None else text.get("eos_token_id")
        if isinstance(eos, list | tuple):
            picked["eos_token_id"] = tuple(typed("eos_token_id", item, "int") for item in eos)
        else:
            # The released model's number would mean nothing in another vocabulary.
            picked["eos_token_id"] = () if eos is None else typed("eos_token_id", eos, "int")
        return cls(**picked)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The released `config.json` layout; `from_dict` reads back an equal configuration."""
        values: dict[str, object] = {
            "architectures": ["Step3VLForConditionalGeneration"],
            "auto_map": {
                "AutoConfig": "configuration_step3.Step3VLConfig",
                "AutoModelForCausalLM": "modeling_step3.Step3vForConditionalGeneration",
            },
            "model_type": "step3_vl",
        }
        nested = ("text", "vision", "quantization", "dtype")
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in nested}
        if not isinstance(self.eos_token_id, int):
            flat["eos_token_id"] = list(self.eos_token_id) or None
        values |= flat | {"text_config": self.text.to_dict(self.dtype)}
        if self.vision is not None:
            values["vision_config"] = dataclasses.asdict(self.vision)
        values["torch_dtype"] = self.dtype
        if self.quantization is not None:
            block = list(self.quantization.weight_block_size)
            values["quantization_config"] = dataclasses.asdict(self.quantization) | {"weight_block_size": block}
        return values

    @classmethod
    def load(cls, path: str | pathlib.Path) -> ModelConfig:
        """Reads `config.json`, from the file or its folder."""
        path = pathlib.Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise ValueError(f"no config.json at {file}; give a model folder or a config file")
        values = read_json_object(file)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of the configurations that ship with the project: `step3`, `step3-fp8`, `step3-tiny`."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
        return cls.load(resources.find(f"configs/models/{name}.json"))
