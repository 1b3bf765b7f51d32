"""Every setting of the engine, once: the Python API, the command line, the YAML file and the table in the docs read it here.

Nothing here imports jax, so that `--help` does not wait for it. Names are vLLM's wherever vLLM has one.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Self

import yaml

from step3_jax.deployment import KV_CACHE_DTYPES
from step3_jax.gpu import MEMORY_SHARE

# In the order in which help and docs show them.
GROUPS = {
    "model": "loading",
    "batch": "batches",
    "cache": "KV cache",
    "devices": "several devices",
}

# Names of version 0.1 and of transformers, for the hint alone.
_FORMER_NAMES = {"max_batch_size": "max_num_seqs", "max_length": "max_model_len", "torch_dtype": "dtype"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What help, docs and checks need to know of a field.

    Attributes:
      help: One sentence, without the default.
      group: A key of `GROUPS`.
      choices: All allowed values; empty if there are others.
      least: The smallest allowed number.
      most: The largest allowed number.
      auto: What None stands for; empty if None is not allowed.
      metavar: What stands for the value in help.
      flags: Short spellings on the command line.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    auto: str = ""
    metavar: str = "N"
    flags: tuple[str, ...] = ()


def _setting(default: object, help: str, group: str, **values: object) -> typing.Any:
    setting = Setting(help, group, **values)  # type: ignore[arg-type]
    return dataclasses.field(default=default, metadata={"setting": setting})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of an engine; `LLM(model, **fields)` takes them by name.

    `settings()` has the meaning, the range and the default of each; `docs/configuration.md` shows them as a table.

    Raises:
      ValueError: For a value that is not allowed; the message names the field, the value and what is allowed.
    """

    dtype: str = _setting(
        "auto",
        "weights and activations; auto is the checkpoint's, but float32 on a CPU, which computes in it in any case",
        "model",
        choices=("auto", "float32", "bfloat16"),
    )
    max_model_len: int | None = _setting(
        None, "most tokens of prompt and output together", "model", least=1, auto="the model's own limit"
    )
    seed: int | None = _setting(
        0,
        "of requests that have no seed: the same calls give the same outputs",
        "model",
        least=-(2**63),
        most=2**64 - 1,
        auto="a different one at every start",
    )
    trust_remote_code: bool = _setting(
        False, "accepted for compatibility and without effect: no code of a checkpoint is ever run", "model"
    )
    max_num_seqs: int = _setting(
        32, "most sequences that run at once, rounded down to a power of two; others wait", "batch", least=1
    )
    max_num_batched_tokens: int = _setting(
        4096, "most prompt tokens prefilled at once; longer prompts are prefilled in chunks", "batch", least=1
    )
    long_prefill_token_threshold: int | None = _setting(
        None,
        "most tokens of a chunk for one prompt while others wait for theirs",
        "batch",
        least=1,
        auto="half of max_num_batched_tokens",
    )
    stream_interval: int = _setting(4, "most tokens between two pieces of a streamed output", "batch", least=1)
    max_call_ms: float = _setting(
        100.0,
        "longest decode call, in milliseconds: nothing that arrives waits longer for its turn (one step at least)",
        "batch",
        least=0.0,
        metavar="MS",
    )
    kv_cache_dtype: str = _setting(
        "auto",
        "format of the KV cache; auto is that of the activations, fp8 and int4 keep scales beside the values",
        "cache",
        choices=("auto", *KV_CACHE_DTYPES),
    )
    gpu_memory_utilization: float = _setting(
        MEMORY_SHARE,
        "share of a GPU's memory that JAX takes, unless XLA_CLIENT_MEM_FRACTION says otherwise",
        "cache",
        least=0.01,
        most=1.0,
        metavar="X",
    )
    kv_cache_memory_bytes: int | None = _setting(
        None,
        "memory of the KV cache, of each shard if there are several",
        "cache",
        least=1,
        auto="what the device has left, at most room for max_num_seqs sequences of max_model_len",
        metavar="BYTES",
    )
    enable_prefix_caching: bool = _setting(
        True, "reuse the KV cache of pages of 64 tokens that an earlier request had in the same place", "cache"
    )
    data_parallel_size: int = _setting(
        1, "groups of devices, each with all weights outside the routed experts", "devices", least=1, flags=("--dp",)
    )
    tensor_parallel_size: int = _setting(
        1,
        "devices of a group: dense weights are sharded across them, and each has sequences of its own",
        "devices",
        least=1,
        flags=("--tp",),
    )
    expert_parallel_size: int | None = _setting(
        None,
        "groups that the routed experts are sharded across",
        "devices",
        least=1,
        auto="the most that the model allows",
        flags=("--ep",),
    )
    attention_parallelism: str = _setting(
        "data",
        "data: every device has sequences of its own; tensor: query heads are sharded across the devices of a group, "
        "each of which holds the same KV cache",
        "devices",
        choices=("data", "tensor"),
    )
    expert_exchange: str = _setting(
        "auto",
        "how tokens reach their experts; auto is all_to_all between hosts, else gather",
        "devices",
        choices=("auto", "gather", "all_to_all"),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def of(cls, values: Mapping[str, object], *, source: str = "") -> Self:
        """A configuration from names and values.

        Args:
          values: The fields that are not at their defaults.
          source: Where they come from, put before messages.

        Raises:
          ValueError: For a value that is not allowed, or a name that does not exist; the message has the nearest one.
        """
        prefix = f"{source}: " if source else ""
        for name in values:
            check_name(name, prefix=prefix)
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def replace(self, **changes: object) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_devices(self) -> int:
        """Devices that the model is spread over."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def is_parallel(self) -> bool:
        """Whether any field asks for a model that is spread over devices."""
        return self.num_devices > 1 or self.expert_parallel_size is not None

    def to_dict(self) -> dict[str, object]:
        """All fields by name."""
        return dataclasses.asdict(self)


def settings() -> dict[str, tuple[dataclasses.Field[object], Setting]]:
    """All fields of `EngineConfig` with what there is to say of them, in order."""
    return {field.name: (field, field.metadata["setting"]) for field in dataclasses.fields(EngineConfig)}


def check_name(name: str, *, prefix: str = "") -> None:
    """Raises ValueError if no field has this name; the message has the nearest one."""
    names = list(settings())
    if name in names:
        return
    nearest = difflib.get_close_matches(_FORMER_NAMES.get(name, name), names, 1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
    raise ValueError(f"{prefix}there is no setting {name!r}; {hint}")


def read_config_file(path: str | pathlib.Path) -> tuple[dict[str, object], str | dict[str, object] | None]:
    """Reads a configuration file: YAML with fields of `EngineConfig`, and a section `deployment` for devices.

    Dashes in names stand for underscores, as on the command line.

    Args:
      path: The file.

    Returns:
      The fields, and the deployment: the name or path of a deployment file, or what such a file would hold
      (see `step3_jax.deployment.parse_deployment`); None without one.

    Raises:
      ValueError: If the file cannot be read or has a name that does not exist.
    """
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
            f"{file} holds {type(values).__name__}; a mapping of settings is needed, as --print-config prints"
        )
    fields = {str(name).replace("-", "_"): value for name, value in values.items()}
    deployment = fields.pop("deployment", None)
    if deployment is not None and not isinstance(deployment, str | dict):
        raise ValueError(
            f"{file}: deployment is {deployment!r}; a mapping, or the name of a deployment file, is needed"
        )
    EngineConfig.of(fields, source=str(file))
    return fields, deployment


def format_config(config: EngineConfig, deployment: str | Mapping[str, object] | None = None) -> str:
    """The YAML that `read_config_file` reads as this configuration."""
    values = config.to_dict() | ({} if deployment is None else {"deployment": deployment})
    return yaml.safe_dump(values, sort_keys=False)


def format_table() -> str:
    """All settings as a Markdown table."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, (field, setting) in settings().items():
        default = setting.auto if field.default is None else f"`{str(field.default).lower()}`"
        if not isinstance(field.default, bool) and field.default is not None:
            default = f"`{field.default}`"
        choices = f" (one of {', '.join(f'`{choice}`' for choice in setting.choices)})" if setting.choices else ""
        rows.append(f"| `{name}` | {default} | {setting.help}{choices} |")
    return "\n".join(rows) + "\n"


def kind_of(field: dataclasses.Field[object]) -> type:
    """The type of a field's values: bool, int, float or str; None is apart."""
    hint = typing.get_type_hints(EngineConfig)[field.name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if option is not types.NoneType)


def _check(field: dataclasses.Field[object], value: object) -> None:
    setting: Setting = field.metadata["setting"]
    if value is None and setting.auto:
        return
    kind = kind_of(field)
    is_kind = isinstance(value, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(value, bool)
    )
    if kind is str:
        is_allowed, wanted = value in setting.choices, ", ".join(setting.choices)
        if not is_allowed:
            raise ValueError(f"{field.name} is {value!r}; allowed: {wanted}")
        return
    least, most = setting.least, setting.most
    if is_kind and (least is None or value >= least) and (most is None or value <= most):  # type: ignore[operator]
        return
    if kind is bool:
        wanted = "True or False is needed"
    else:
        noun = "a whole number" if kind is int else "a number"
        wanted = f"{noun} of at least {least} is needed" if most is None else f"{noun} from {least} to {most} is needed"
    raise ValueError(f"{field.name} is {value!r}; {wanted}{', or None' if setting.auto else ''}")


if __name__ == "__main__":
    print(format_table(), end="")
