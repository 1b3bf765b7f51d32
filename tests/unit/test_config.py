"""config.json: what the released file says, what the class defaults do not, and what is invalid."""

from __future__ import annotations

import dataclasses
import json

import pytest

from step3_jax.config import PRESETS, ModelConfig, QuantConfig, TextConfig, VisionConfig


@pytest.fixture
def values(goldens):
    """A released config.json, as a dictionary to change."""
    return json.loads((goldens / "tiny_fp8" / "config.json").read_text())


@pytest.mark.parametrize("name", ["step3", "step3-fp8"])
def test_presets_are_the_released_model(name):
    config = ModelConfig.preset(name)
    text = config.text
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.head_dim) == (7168, 61, 64, 256)
    assert (text.moe_num_experts, text.moe_top_k, text.share_q_dim, text.vocab_size) == (48, 3, 2048, 128815)
    assert text.moe_layers == tuple(range(4, 60))
    assert config.vision.intermediate_size == 15360
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (128805,))
    assert (config.quantization is not None) == (name == "step3-fp8")


def test_projector_has_stride_two_and_no_bias():
    config = ModelConfig.preset("step3")
    assert config.understand_projector_stride == 2
    assert config.projector_bias is False
    assert config.num_image_tokens(52) == config.image_token_len == 169
    assert config.num_image_tokens(36) == config.patch_token_len == 81


def test_stride_must_fit_the_number_of_image_tokens(values):
    values["understand_projector_stride"] = 1
    with pytest.raises(ValueError, match="image_token_len is 4"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("layers", ["1,2", " 1, 2,", [1, 2], (2, 1), ["1", "2"]])
def test_mixture_layers_may_be_a_string_a_list_or_a_tuple(values, layers):
    values["text_config"]["moe_layers_enum"] = layers
    config = ModelConfig.from_dict(values)
    assert config.text.moe_layers == (1, 2)
    assert [config.text.is_moe_layer(layer) for layer in range(3)] == [False, True, True]


def test_without_mixture_layers_every_layer_but_the_first_is_one(values):
    del values["text_config"]["moe_layers_enum"]
    assert ModelConfig.from_dict(values).text.moe_layers == (1, 2)


def test_empty_mixture_layers_make_a_dense_model(values):
    values["text_config"]["moe_layers_enum"] = ""
    assert ModelConfig.from_dict(values).text.moe_layers == ()


@pytest.mark.parametrize("layers", ["1,x", 5, [None], "3", [-1]])
def test_wrong_mixture_layers_are_named(values, layers):
    values["text_config"]["moe_layers_enum"] = layers
    with pytest.raises(ValueError, match="moe_layers_enum"):
        ModelConfig.from_dict(values)


def test_length_is_spelled_without_s(values):
    text = values["text_config"]
    text["max_position_embedding"], text["max_seq_len"] = 300, 200
    assert ModelConfig.from_dict(values).text.max_position_embeddings == 300
    del text["max_position_embedding"]
    assert ModelConfig.from_dict(values).text.max_position_embeddings == 200
    text["max_position_embeddings"] = 100
    assert ModelConfig.from_dict(values).text.max_position_embeddings == 100


def test_whole_number_for_rope_theta_is_a_float(values):
    assert values["text_config"]["rope_theta"] == 500000
    assert isinstance(ModelConfig.from_dict(values).text.rope_theta, float)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("model_type", "step3p7"),
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", "Step3VLForConditionalGeneration"),
    ],
)
def test_other_architectures_are_refused(values, key, value):
    values[key] = value
    with pytest.raises(ValueError, match=r"not a Step3 model|architectures is"):
        ModelConfig.from_dict(values)


WRONG = [
    ("text_config", "hidden_size", 0),
    ("text_config", "hidden_size", -5),
    ("text_config", "hidden_size", "64"),
    ("text_config", "hidden_size", 64.5),
    ("text_config", "hidden_size", True),
    ("text_config", "hidden_size", [64]),
    ("text_config", "num_attention_groups", 2),
    ("text_config", "head_dim", 33),
    ("text_config", "moe_top_k", 5),
    ("text_config", "moe_top_k", 0),
    ("text_config", "moe_num_experts", 0),
    ("text_config", "rope_theta", 0),
    ("text_config", "rope_theta", "big"),
    ("text_config", "rms_norm_eps", 0.0),
    ("text_config", "rms_norm_eps", float("nan")),
    ("text_config", "rope_scaling", {"type": "yarn"}),
    ("text_config", "max_position_embedding", "many"),
    ("text_config", "vocab_size", 0),
    ("text_config", "norm_expert_weight", "no"),
    ("vision_config", "num_attention_heads", 3),
    ("vision_config", "image_size", 113),
    ("vision_config", "hidden_act", "gelu"),
    ("vision_config", "patch_size", 0),
    ("quantization_config", "quant_method", "awq"),
    ("quantization_config", "fmt", "e5m2"),
    ("quantization_config", "activation_scheme", "static"),
    ("quantization_config", "weight_block_size", [128]),
    ("quantization_config", "weight_block_size", [0, 128]),
    ("quantization_config", "weight_block_size", "128"),
    (None, "torch_dtype", "int8"),
    ("text_config", "rope_parameters", 5),
    ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": "big"}),
    (None, "torch_dtype", 5),
    (None, "image_token_id", 160),
    (None, "image_token_len", 5),
    (None, "understand_projector_stride", 0),
    (None, "projector_bias", 1),
    (None, "eos_token_id", "end"),
    (None, "eos_token_id", ["end"]),
    (None, "text_config", 5),
    (None, "vision_config", []),
]


@pytest.mark.parametrize(("section", "key", "value"), WRONG, ids=lambda part: str(part))
def test_impossible_values_are_named(values, section, key, value):
    (values[section] if section else values)[key] = value
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_dict(values)


ROPE_PLACES = ["text_config", None]


@pytest.mark.parametrize("section", ROPE_PLACES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_theta_is_found_where_newer_files_have_it(values, section, key):
    del values["text_config"]["rope_theta"]
    (values[section] if section else values)[key] = {"rope_type": "default", "rope_theta": 10000}
    assert ModelConfig.from_dict(values).text.rope_theta == 10000.0


def test_theta_may_stand_one_level_further_out(values):
    del values["text_config"]["rope_theta"]
    values["rope_theta"] = 10000.0
    assert ModelConfig.from_dict(values).text.rope_theta == 10000.0


@pytest.mark.parametrize("section", ROPE_PLACES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_two_thetas_that_differ_are_refused(values, section, key):
    (values[section] if section else values)[key] = {"rope_type": "default", "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=rf"different values: 10000.0 in {key}, 500000.0 in rope_theta"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("section", ROPE_PLACES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "scaling",
    [None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "partial_rotary_factor": 1.0}],
)
def test_no_scaling_may_be_written_in_every_form(values, section, key, scaling):
    (values[section] if section else values)[key] = scaling
    assert ModelConfig.from_dict(values).text.rope_theta == 500000.0


@pytest.mark.parametrize("section", ROPE_PLACES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        {"factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_scaling_is_refused_at_every_level(values, section, key, scaling):
    (values[section] if section else values)[key] = scaling
    with pytest.raises(ValueError, match=rf"{key} is .*not scaled"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("section", ["text_config", None])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("num_key_value_heads", 8),
        ("sliding_window", 512),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
        ("scoring_func", "sigmoid"),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_another_model_computes_is_refused_not_passed_over(values, section, key, value):
    (values[section] if section else values)[key] = value
    with pytest.raises(ValueError, match=f"{key} is .*another model"):
        ModelConfig.from_dict(values)


def test_keys_that_change_nothing_are_passed_over(values):
    expected = ModelConfig.from_dict(values)
    values["text_config"] |= {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention"] * 3,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
    }
    values |= {"hidden_size": values["text_config"]["hidden_size"], "use_cache": True, "transformers_version": "5.1.0"}
    assert ModelConfig.from_dict(values) == expected


def test_a_size_that_stands_at_two_levels_with_two_values_is_refused(values):
    values["hidden_size"] = values["text_config"]["hidden_size"] + 8
    with pytest.raises(ValueError, match=r"hidden_size is .* and text_config.hidden_size is"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("float32", "float32"),
        ("float64", "float32"),
        ("float16", "bfloat16"),
        ("half", "bfloat16"),
        ("torch.float16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
    ],
)
def test_a_dtype_that_nothing_computes_in_gives_way_to_the_next(values, stored, expected):
    values["torch_dtype"] = stored
    assert ModelConfig.from_dict(values).dtype == expected
    values["dtype"] = values.pop("torch_dtype")
    assert ModelConfig.from_dict(values).dtype == expected


def test_without_an_end_token_there_is_none(values):
    del values["eos_token_id"]
    config = ModelConfig.from_dict(values)
    assert config.eos_token_ids == ()
    assert ModelConfig.from_dict(config.to_dict()) == config
    values["text_config"]["eos_token_id"] = 3
    assert ModelConfig.from_dict(values).eos_token_ids == (3,)


def test_text_only_configuration(values):
    text = values["text_config"] | {"model_type": "step3_text", "eos_token_id": [2, 3]}
    config = ModelConfig.from_dict(text)
    assert config.vision is None
    assert config.text == ModelConfig.from_dict(values).text
    assert config.eos_token_ids == (2, 3)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_file_layout_makes_the_round_trip(name):
    try:
        config = ModelConfig.preset(name)
    except ValueError:
        pytest.skip(f"configs/models/{name}.json is not in this checkout")
    for variant in (config, dataclasses.replace(config, vision=None, eos_token_id=(1, 2), dtype="float32")):
        assert ModelConfig.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant


def test_written_layers_are_a_string_and_the_length_has_no_s():
    text = ModelConfig().to_dict()["text_config"]
    assert text["moe_layers_enum"].startswith("4,5,6,")
    assert text["max_position_embedding"] == 65536


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"]
)
def test_useless_files_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_missing_file_and_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        ModelConfig.load(tmp_path)
    with pytest.raises(ValueError, match="allowed: step3, step3-fp8"):
        ModelConfig.preset("step4")


def test_derived_sizes():
    assert TextConfig().query_size == 16384
    assert VisionConfig().head_dim == 112
    assert VisionConfig().grid == 52
    assert QuantConfig().weight_block_size == (128, 128)
