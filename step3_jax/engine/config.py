"""Every setting of the engine, once: the Python API, the command line, the YAML file and the table in the docs read it here.

Nothing here imports jax, so that `--help` does not wait for it. Names are vLLM's wherever vLLM has one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Self

import yaml

from step3_jax.engine.setting import Setting, check_name, check_values, define, format_table, settings_of
from step3_jax.gpu import MEMORY_SHARE
from step3_jax.layout.page import KV_CACHE_CHOICES
from step3_jax.layout.weight_form import LOAD_FORMATS, QUANTIZATIONS
from step3_jax.sampling.speculation import Speculation

# In the order of the help and the docs.
GROUPS = {
    "model": "loading",
    "batch": "batches",
    "cache": "KV cache",
    "devices": "several devices",
}

# Names from version 0.1 and from transformers, used only for the hint.
_FORMER_NAMES = {"max_batch_size": "max_num_seqs", "max_length": "max_model_len", "torch_dtype": "dtype"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of an engine; `LLM(model, **fields)` takes them by name.

    `settings()` has the meaning, range and default of each; `docs/configuration.md` shows them as a table.

    Raises:
      ValueError: For a value that is not allowed; the message names the field, the value and what is allowed.
    """

    dtype: str = define(
        "auto",
        "activations, and weights without quantization; auto is the checkpoint's dtype, or float32 on a CPU",
        "model",
        choices=("auto", "float32", "bfloat16"),
    )
    quantization: str = define(
        "auto",
        "form of the linear weights: none is dtype, stored is the file's, others quantise at load; auto is stored where the "
        "device's kernels multiply it, else none",
        "model",
        choices=QUANTIZATIONS,
    )
    load_format: str = define(
        "auto",
        "how weights come to a CPU: auto copies them, mmap leaves them in the file wherever they need no change",
        "model",
        choices=LOAD_FORMATS,
    )
    max_model_len: int | None = define(
        None, "most tokens of prompt and output together", "model", least=1, auto="the model's own limit"
    )
    seed: int | None = define(
        0,
        "seed of requests that have none: the same calls give the same outputs",
        "model",
        least=-(2**63),
        most=2**64 - 1,
        auto="a different one at every start",
    )
    trust_remote_code: bool = define(
        False, "accepted for compatibility, without effect: no code of a checkpoint is ever run", "model"
    )
    max_num_seqs: int = define(
        32, "most sequences that run at a time, rounded down to a power of two; others wait", "batch", least=1
    )
    max_num_batched_tokens: int = define(
        4096, "most prompt tokens prefilled at a time; longer prompts are prefilled in chunks", "batch", least=1
    )
    long_prefill_token_threshold: int | None = define(
        None,
        "most tokens of one prompt in a chunk while others wait",
        "batch",
        least=1,
        auto="half of max_num_batched_tokens",
    )
    stream_interval: int = define(4, "most tokens in a piece of a streamed output", "batch", least=1)
    max_call_ms: float = define(
        100.0,
        "longest decode call, in milliseconds: no new request waits longer than that (at least one step)",
        "batch",
        least=0.0,
        metavar="MS",
    )
    speculative_config: Mapping[str, object] | None = define(
        None,
        'guess tokens and verify several in one step, with the same outputs: {"method": "ngram", "num_speculative_tokens": '
        '4}, and "prompt_lookup_max", "prompt_lookup_min"',
        "batch",
        auto="one token a step",
        metavar="JSON",
    )
    kv_cache_dtype: str = define(
        "auto",
        "format of the KV cache; auto is that of the activations, fp8 and int4 keep scales beside the values",
        "cache",
        choices=KV_CACHE_CHOICES,
    )
    gpu_memory_utilization: float = define(
        MEMORY_SHARE,
        "share of a GPU's memory that JAX takes, unless XLA_CLIENT_MEM_FRACTION is set",
        "cache",
        least=0.01,
        most=1.0,
        metavar="X",
    )
    kv_cache_memory_bytes: int | None = define(
        None,
        "memory of the KV cache, per shard if there are several",
        "cache",
        least=1,
        auto="the device's free memory, at most enough for max_num_seqs sequences of max_model_len",
        metavar="BYTES",
    )
    enable_prefix_caching: bool = define(
        True, "reuse pages of 64 tokens of the KV cache that an earlier request had in the same place", "cache"
    )
    data_parallel_size: int = define(
        1, "groups of devices, each with all weights outside the routed experts", "devices", least=1, flags=("--dp",)
    )
    tensor_parallel_size: int = define(
        1,
        "devices of a group: dense weights are sharded across them, and each has its own sequences",
        "devices",
        least=1,
        flags=("--tp",),
    )
    expert_parallel_size: int | None = define(
        None,
        "groups that the routed experts are sharded across",
        "devices",
        least=1,
        auto="the most that the model allows",
        flags=("--ep",),
    )
    attention_parallelism: str = define(
        "data",
        "data: every device has its own sequences; tensor: query heads are sharded across the devices of a group, "
        "each of which holds the same KV cache",
        "devices",
        choices=("data", "tensor"),
    )
    mm_encoder_tp_mode: str = define(
        "weights",
        "weights: the vision tower is sharded across the devices of a group (with AFD of an attention instance), which "
        "encode each image together; data: each device has all of it and encodes its own images",
        "devices",
        choices=("weights", "data"),
    )
    expert_exchange: str = define(
        "auto",
        "how tokens reach their experts; auto is all_to_all between hosts, otherwise gather",
        "devices",
        choices=("auto", "gather", "all_to_all"),
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.speculative_config is not None:
            Speculation.of(self.speculative_config)
            # A dictionary of its own, which YAML can write; the class is frozen.
            object.__setattr__(self, "speculative_config", dict(self.speculative_config))

    @classmethod
    def of(cls, values: Mapping[str, object], *, source: str = "") -> Self:
        """A configuration from names and values.

        Args:
          values: The fields that are not at their defaults.
          source: Where they come from; prefixed to error messages.

        Raises:
          ValueError: For a value that is not allowed, or an unknown name; the message suggests the nearest one.
        """
        prefix = f"{source}: " if source else ""
        for name in values:
            check_name(name, settings(), prefix=prefix, former=_FORMER_NAMES)
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def replace(self, **changes: object) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_devices(self) -> int:
        """Number of devices that the model is spread over."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def speculation(self) -> Speculation | None:
        """How tokens are guessed; None without speculation."""
        return None if self.speculative_config is None else Speculation.of(self.speculative_config)

    @property
    def is_parallel(self) -> bool:
        """Whether any field spreads the model over devices."""
        return self.num_devices > 1 or self.expert_parallel_size is not None

    def to_dict(self) -> dict[str, object]:
        """All fields by name."""
        return dataclasses.asdict(self)


def settings() -> dict[str, tuple[dataclasses.Field[object], Setting]]:
    """All fields of `EngineConfig` with their descriptions, in order."""
    return settings_of(EngineConfig)


def read_config_file(path: str | pathlib.Path) -> tuple[dict[str, object], str | dict[str, object] | None]:
    """Reads a configuration file: YAML with fields of `EngineConfig`, and a `deployment` section for devices.

    Dashes in names stand for underscores, as on the command line. The `server` section configures the service, see
    `read_server_section`.

    Args:
      path: The file.

    Returns:
      The fields, and the deployment: the name or path of a deployment file, or the contents of one
      (see `step3_jax.layout.deployment.parse_deployment`); None without one.

    Raises:
      ValueError: If the file cannot be read or has an unknown name.
    """
    fields = _read_mapping(path)
    fields.pop("server", None)
    deployment = fields.pop("deployment", None)
    if deployment is not None and not isinstance(deployment, str | dict):
        raise ValueError(f"{path}: deployment is {deployment!r}; it must be a mapping or the name of a deployment file")
    EngineConfig.of(fields, source=str(path))
    return fields, deployment


def read_server_section(path: str | pathlib.Path) -> dict[str, object]:
    """The `server` section of a configuration file, with underscores in its names; empty if absent.

    Raises:
      ValueError: If the file cannot be read, or the section is not a mapping.
    """
    section = _read_mapping(path).get("server")
    if section is not None and not isinstance(section, Mapping):
        raise ValueError(f"{path}: server is {section!r}; it must be a mapping of the service's settings")
    return {str(name).replace("-", "_"): value for name, value in (section or {}).items()}


def _read_mapping(path: str | pathlib.Path) -> dict[str, object]:
    """A YAML file's names and values, with underscores for dashes."""
    file = pathlib.Path(path).expanduser()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{file} holds {type(values).__name__}; a mapping of settings is needed, like the one that --print-config prints"
        )
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def format_config(config: EngineConfig, deployment: str | Mapping[str, object] | None = None) -> str:
    """The YAML that `read_config_file` reads as this configuration."""
    values = config.to_dict() | ({} if deployment is None else {"deployment": deployment})
    return yaml.safe_dump(values, sort_keys=False)


if __name__ == "__main__":
    print(format_table(EngineConfig), end="")
