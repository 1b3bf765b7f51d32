"""Values of a released `config.json`: their types, their alternative spellings, and other models' keys to refuse."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import cast

# A config.json is untrusted: what is made for each layer must not fill the memory.
MAX_LAYERS = 10_000
# Names in files for the dtype of their weights, and what the model then computes in. Nothing computes in float16:
# its weights become bfloat16, rounded to 8 bits of mantissa, unless float32 is requested.
FILE_DTYPES = {
    "float32": "float32",
    "float": "float32",
    "float64": "float32",
    "double": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
    "half": "bfloat16",
}
# Keys of other models, and the values with which they have no effect here. Any other value is refused: a model that
# silently ignores what its file asks for gives wrong answers.
FIXED_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "num_key_value_heads": (1,),
    "norm_topk_prob": (False,),
    "scoring_func": ("softmax",),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1,),
    "sliding_window": (),
    "partial_rotary_factor": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
}
# Keys for scaling the rotary embedding: transformers 5 has its base there too.
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError unless a value is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} is {value!r}; a positive whole number is needed")


def check_layers(section: str, num_layers: int) -> None:
    """Raises ValueError for more layers than `MAX_LAYERS`."""
    if num_layers > MAX_LAYERS:
        raise ValueError(f"{section}.num_hidden_layers is {num_layers}; at most {MAX_LAYERS} are allowed")


_KINDS = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
}


def pick(cls: type, prefix: str, values: Mapping[str, object], skip: Sequence[str] = ()) -> dict[str, object]:
    """The fields of a configuration class that a file gives, each checked for the field's type."""
    return {
        field.name: typed(prefix + field.name, values[field.name], str(field.type))
        for field in dataclasses.fields(cls)
        if field.name not in skip and values.get(field.name) is not None
    }


def typed(name: str, value: object, kind: str) -> object:
    """A value of the kind "int", "float", "bool" or "str". Raises ValueError for another."""
    allowed, noun = _KINDS[kind]
    if kind == "float" and type(value) is int:
        value = float(min(value, sys.float_info.max))
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name} is {value!r}; {noun} is needed")
    return value


def with_outer(
    text: Mapping[str, object], values: Mapping[str, object], fields: Collection[str]
) -> Mapping[str, object]:
    """`text_config` merged with the keys one level up, where some tools write them.

    Args:
      text: The section.
      values: The whole file.
      fields: Names of the section's values.

    Raises:
      ValueError: Where the two disagree.
    """
    names = {
        *fields,
        *FIXED_VALUES,
        *_ROPE_KEYS,
        "layer_types",
        "moe_layers_enum",
        "max_position_embedding",
        "max_seq_len",
    }
    outer = {name: values[name] for name in names if values.get(name) is not None}
    for name, value in outer.items():
        if text.get(name) is not None and text[name] != value:
            raise ValueError(f"{name} is {value!r}, and text_config.{name} is {text[name]!r}; remove the wrong one")
    return {**text, **outer}


def check_fixed(prefix: str, values: Mapping[str, object]) -> None:
    """Raises ValueError for a value of `FIXED_VALUES` that Step3 does not have."""
    for name, allowed in FIXED_VALUES.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            only = f"Step3 has only {' or '.join(map(repr, allowed))}" if allowed else "Step3 has none"
            raise ValueError(f"{prefix}{name} is {value!r}: {only}, so this is another model")
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        raise ValueError(f"{prefix}layer_types is {kinds!r}: Step3 has only 'full_attention', so this is another model")


def rope_theta(prefix: str, values: Mapping[str, object]) -> float | None:
    """The base of the rotary embedding, which newer files have in `rope_parameters`; None if it is not given.

    Raises:
      ValueError: For a scaling, and if two places disagree.
    """
    found: dict[str, object] = {}
    for name in _ROPE_KEYS:
        parameters = values.get(name)
        if not parameters:
            continue
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{prefix}{name} is {parameters!r}; an object is needed")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        factor = parameters.get("partial_rotary_factor")
        further = parameters.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or further or factor not in (None, 1):
            raise ValueError(
                f"{prefix}{name} is {dict(parameters)!r}: Step3's rotary embedding is not scaled, so only rope_type "
                "'default' with a rope_theta is allowed; remove the key"
            )
        if parameters.get("rope_theta") is not None:
            found[name] = typed(f"{prefix}{name}.rope_theta", parameters["rope_theta"], "float")
    if values.get("rope_theta") is not None:
        found["rope_theta"] = typed(f"{prefix}rope_theta", values["rope_theta"], "float")
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{prefix}rope_theta is given with different values: "
            + ", ".join(f"{value!r} in {name}" for name, value in found.items())
        )
    return cast("float | None", next(iter(found.values()), None))


def section(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    """An object inside the file. Raises ValueError if there is none."""
    found = values.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} is {found!r}; config.json of a Step3 model has an object there")
    return found


def parse_dtype(value: object) -> str:
    """The dtype that the model computes in, from the file's `torch_dtype`. Raises ValueError for an unknown name."""
    name = str(typed("torch_dtype", value, "str")).removeprefix("torch.")
    if name not in FILE_DTYPES:
        raise ValueError(f"torch_dtype is {value!r}; allowed: {', '.join(FILE_DTYPES)}")
    return FILE_DTYPES[name]


def parse_layers(value: object, num_layers: int) -> tuple[int, ...]:
    """`moe_layers_enum`: the released file has a string "4,5,...", others a list or a tuple.

    If absent, the released code makes every layer except the first a mixture.
    """
    if value is None:
        return tuple(range(1, num_layers))
    items = [item for item in value.strip().split(",") if item.strip()] if isinstance(value, str) else value
    try:
        return tuple(sorted({int(item) for item in items}))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(
            f'text_config.moe_layers_enum is {value!r}; layer numbers are needed, as "4,5,6" or [4, 5, 6]'
        ) from None
