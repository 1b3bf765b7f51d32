"""The roles of a deployment: which devices hold what."""

from __future__ import annotations

import dataclasses

import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import load_deployment, parse_deployment
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN, Parallel
from step3_jax.layout.role import check_deployment, deployed_config, fp8_block, roles_of
from step3_jax.layout.tensor import list_rows

STEP3 = ModelConfig.preset("step3")


def test_without_instances_all_devices_do_both() -> None:
    (role,) = roles_of(load_deployment("8gpu-fp8-48gb"))
    assert (role.name, role.num_devices, role.has_cache) == (BOTH, 8, True)


def test_with_instances_each_role_has_devices_of_its_own() -> None:
    attention, ffn = roles_of(load_deployment("2a2f"))
    assert (attention.name, attention.num_devices, attention.has_cache) == (ATTENTION, 16, True)
    assert (ffn.name, ffn.num_devices, ffn.has_cache, ffn.parallel) == (FFN, 16, False, Parallel(2, 8, 2))


def test_each_weight_has_one_role() -> None:
    roles = roles_of(load_deployment("2a2f"))
    for row, _ in list_rows(STEP3):
        assert sum(role.holds(row.ours.split(".")) for role in roles) == 1, row


def test_weights_decide_what_is_quantised() -> None:
    for weights, dtype, block in (
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
        ("fp8", "bfloat16", (128, 128)),
    ):
        config = deployed_config(STEP3, weights)
        assert (config.dtype, fp8_block(config)) == (dtype, block)
    assert deployed_config(STEP3, "fp8", text_only=True).vision is None


def test_the_ffn_sides_setting_is_checked_against_the_ffn_alone() -> None:
    text = dataclasses.replace(STEP3.text, hidden_size=7169)
    config = deployed_config(dataclasses.replace(STEP3, text=text), "bfloat16")
    given = {"afd": "1a1f", "devices_per_instance": 8, "ffn": {"tp": 8, "ep": 8}}
    assert check_deployment(config, parse_deployment("x", given)) == Parallel(1, 8, 8)
    together = parse_deployment("x", {"afd": "off", "devices": 8, "parallel": {"tp": 8, "ep": 8}})
    with pytest.raises(ValueError, match="hidden_size is 7169, which tp = 8 does not cut"):
        check_deployment(config, together)
