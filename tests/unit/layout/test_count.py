"""Parameters, bytes and operations: the tables' sums against published sizes, and against a derivation without tables."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.layout.count import (
    CORE_ATTENTION,
    active_parameters,
    count_parameters,
    count_parts,
    decode_flops,
    prefill_flops,
    weight_bytes,
)
from step3_jax.layout.deployment import parse_deployment
from step3_jax.layout.parallel import BOTH, FFN, RoleName, find_problems, list_parallels
from step3_jax.layout.role import Role, deployed_config, fp8_block, roles_of
from tests.unit.layout import weight_oracle

STEP3 = ModelConfig.preset("step3")


def test_sizes_of_the_released_model() -> None:
    assert count_parameters(STEP3) == (316_294_538_240, 4_285_292_032, 390_082_560, 320_969_912_832)
    assert sum(count_parts(STEP3).values()) == 320_969_912_832


@pytest.mark.parametrize(("weights", "published"), [("bfloat16", 641_939_825_664), ("fp8", 327_589_017_984)])
def test_one_device_holds_the_published_bytes(weights: str, published: int) -> None:
    deployment = parse_deployment("one", {"afd": "off", "devices": 1, "weights": weights})
    (role,) = roles_of(deployment)
    assert sum(weight_bytes(deployed_config(STEP3, weights), weights, role).values()) == published


def test_roles_together_hold_each_weight_once() -> None:
    deployment = parse_deployment("pair", {"afd": "1a1f", "weights": "fp8"})
    config = deployed_config(STEP3, "fp8")
    held = [sum(weight_bytes(config, "fp8", role).values()) for role in roles_of(deployment)]
    assert sum(held) == 327_589_017_984


SMALL = TextConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=8,
    head_dim=64,
    share_q_dim=192,
    moe_num_experts=12,
    moe_top_k=2,
    moe_intermediate_size=512,
    share_expert_dim=768,
    moe_layers=(1, 3),
    vocab_size=301,
)


@settings(max_examples=150)
@given(
    st.sampled_from([one for count in (1, 2, 4, 6, 8, 12, 16, 32) for one in list_parallels(count)]),
    st.sampled_from(
        [
            STEP3,
            dataclasses.replace(STEP3, text=SMALL, image_token_id=0),
            dataclasses.replace(STEP3, projector_bias=True),
        ]
    ),
    st.sampled_from(["float32", "bfloat16", "fp8"]),
    st.sampled_from([BOTH, FFN]),
    st.sampled_from(["weights", "data", "none"]),
)
def test_bytes_of_a_device_are_those_of_the_derivation_without_tables(
    parallel, config: ModelConfig, weights: str, name: RoleName, vision
) -> None:
    config = deployed_config(config, weights, text_only=vision == "none")
    parallel = dataclasses.replace(parallel, vision="data" if vision == "data" else "weights")
    if not find_problems(parallel, config.text, fp8_block(config), name):
        role = Role(name, parallel.num_devices, parallel)
        assert weight_bytes(config, weights, role) == weight_oracle.weight_bytes(config, weights, role)


@pytest.mark.parametrize("count", [1, 8, 16])
def test_an_attention_device_holds_all_of_attention_but_the_tower(count: int) -> None:
    config = deployed_config(STEP3, "fp8")
    spec = {"afd": "1a1f", "devices_per_instance": count, "weights": "fp8", "ffn": {"tp": 1, "ep": count}}
    attention = roles_of(parse_deployment("pair", spec))[0]
    found = weight_bytes(config, "fp8", attention)
    assert found == weight_oracle.weight_bytes(config, "fp8", attention)
    assert set(found) == {"attention", "norms and routers", "embedding and head", "vision tower and projector"}


def test_active_parameters_are_those_of_the_release() -> None:
    """The release says 38B."""
    layers, head = active_parameters(STEP3.text)
    assert head == 128_815 * 7168
    assert layers + head == pytest.approx(38e9, rel=0.01)


def test_decoding_multiplies_with_the_active_weights_and_reads_the_context() -> None:
    flops = decode_flops(STEP3.text, 8192)
    # 4 per head's column, token and layer: 2 for the scores, 2 for the values.
    assert flops.pop(CORE_ATTENTION) == 4 * 64 * 256 * 61 * 8192
    assert sum(flops.values()) == 2 * sum(active_parameters(STEP3.text))


def test_a_prompt_is_the_sum_of_its_tokens_but_for_the_head() -> None:
    text, length = SMALL, 12
    head = active_parameters(text)[1]
    # Attention by the square counts half of it: token i attends to i tokens.
    tokens = sum(sum(decode_flops(text, position + 1).values()) - 2 * head for position in range(length))
    diagonal = sum(decode_flops(text, 1).values()) - sum(decode_flops(text, 0).values())
    assert prefill_flops(text, length) == tokens + 2 * head - length * diagonal // 2


def test_a_model_without_experts_has_none_in_its_counts() -> None:
    dense = dataclasses.replace(SMALL, moe_layers=())
    parts = count_parts(dataclasses.replace(STEP3, text=dense, vision=None, image_token_id=0))
    assert set(parts) == {"embedding", "head", "attention", "norms", "dense layers"}
    assert active_parameters(dense, 5) == active_parameters(dense)
