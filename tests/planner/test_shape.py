"""Models as the planner's arithmetic sees them."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.layout.count import count_parts
from step3_jax.planner.shape import ModelShape, list_shapes, load_shape


def test_every_shipped_model_can_be_read_and_says_where_it_is_from() -> None:
    assert {"step3", "dsv3", "kimi-k2", "qwen3-moe", "pangu-pro-moe"} < set(list_shapes())
    for name in list_shapes():
        shape = load_shape(name)
        assert shape.source
        assert sum(group.num_layers for group in shape.attention) == shape.num_layers
        assert 0 < shape.ffn_active_weights() <= sum(shape.weights().values())


@pytest.mark.parametrize("name", ["llama4-maverick", "minimax-m1", "pangu-pro-moe"])
def test_sizes_that_no_file_shows_are_said_to_be_inferred(name: str) -> None:
    assert "give" in load_shape(name).inferred or "only" in load_shape(name).inferred


@pytest.mark.parametrize("preset", ["step3", "step3-tiny"])
def test_a_configurations_weights_are_those_of_the_engines_table(preset: str) -> None:
    config = ModelConfig.preset(preset)
    parts, ours = count_parts(config), ModelShape.of_config(config).weights()
    assert ours["embedding and head"] == parts["embedding"] + parts["head"]
    assert {name: ours[name] for name in ("attention", "dense layers", "shared experts", "routed experts")} == {
        name: parts[name] for name in ("attention", "dense layers", "shared experts", "routed experts")
    }


def test_underscores_and_capitals_name_the_same_model() -> None:
    assert load_shape("Qwen3_MoE") == load_shape("qwen3-moe")


def test_a_config_json_may_be_given_by_its_path() -> None:
    file = resources.find("configs/models/step3.json")
    assert load_shape(str(file)).kv_bytes_read(8192) == load_shape("step3").kv_bytes_read(8192)


def test_a_file_of_the_users_own_is_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(resources.find("configs/planner/models/dsv3.yaml").read_text().replace("heads: 128", "heads: 64"))
    mine, theirs = load_shape(str(file)), load_shape("dsv3")
    assert mine.name == "mine"
    assert mine.attention_flops(100) == theirs.attention_flops(100) / 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: 94\n", "layers: 93\n", "have 94 layers in all, but layers is 93"),
        ("kind: gqa", "kind: gpa", "did you mean gqa"),
        ("top_k: 8", "top_k: 800", "more than the 128 experts"),
        ("top_k: 8", "topk: 8", "unknown key topk; did you mean top_k"),
        ("heads: 64", "heads: 0", "heads is 0; a whole number of at least 1"),
        ("printed_name", "printed_nam", "unknown key printed_nam"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: pathlib.Path, old: str, new: str, message: str) -> None:
    text = resources.find("configs/planner/models/qwen3-moe.yaml").read_text()
    assert old in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_shape(str(file))


def test_an_unknown_model_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"did you mean dsv3\? Known: step3,"):
        load_shape("dsv2")


def test_a_latent_cache_has_a_smaller_right_count_of_flops() -> None:
    shape = load_shape("dsv3")
    assert shape.attention_flops(8192, "exact") / shape.attention_flops(8192, "report") == pytest.approx(1088 / 1152)


def test_few_tokens_read_few_experts_and_many_read_all() -> None:
    shape = load_shape("step3")
    all_weights = sum(shape.weights()[part] for part in ("dense layers", "shared experts", "routed experts"))
    assert shape.ffn_weights_read(1) == pytest.approx(shape.ffn_active_weights())
    assert shape.ffn_weights_read(1000) == pytest.approx(all_weights, rel=1e-6)
