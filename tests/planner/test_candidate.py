"""The deployments that an inventory allows."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import format_deployment, parse_deployment
from step3_jax.layout.parallel import BOTH, FFN, find_problems
from step3_jax.layout.role import deployed_config, fp8_block
from step3_jax.planner.candidate import Candidate, list_candidates, parse_pool
from step3_jax.planner.cost import Prices

CONFIG = deployed_config(ModelConfig.preset("step3"), "fp8")


def candidates(*words: str, **prices: float) -> list[Candidate]:
    return list(list_candidates(CONFIG, [parse_pool(word, Prices(prices)) for word in words]))


def test_every_candidate_divides_the_model_and_is_in_the_inventory() -> None:
    found = candidates("h800:40", "h20:24")
    assert {one.kind for one in found} == {"afd", "ep", "tp"}
    for one in found:
        role = BOTH if one.topology is None else FFN
        assert not find_problems(one.parallel, CONFIG.text, fp8_block(CONFIG), role), one
        used = {"h800": 0, "h20": 0}
        used[one.attention.hardware.name] += one.num_attention
        if one.topology is not None:
            used[one.ffn.hardware.name] += one.num_devices - one.num_attention
        assert used["h800"] <= 40
        assert used["h20"] <= 24


def test_the_reports_deployments_are_among_them() -> None:
    found = candidates("h800:144")
    for name in ("2a2f", "4a2f", "16a2f"):
        same = [one for one in found if one.name == name and one.topology.devices_per_instance == 8]
        assert str(same[0].parallel) == "dp 2, tp 8, ep 2"


def test_two_kinds_of_hardware_take_either_role() -> None:
    pairs = {(one.attention.hardware.name, one.ffn.hardware.name) for one in candidates("h800:16", "h20:16")}
    assert pairs == {("h800", "h800"), ("h20", "h20"), ("h800", "h20"), ("h20", "h800")}


def test_the_processor_of_a_machine_is_the_ffn_side_of_its_own_accelerators() -> None:
    mixed = [one for one in candidates("h800:16", "cpu-2-socket:2") if one.attention.hardware is not one.ffn.hardware]
    assert {one.name for one in mixed} == {f"{count}a1f" for count in range(1, 9)}
    assert {one.ffn.hardware.name for one in mixed} == {"cpu-2-socket"}
    assert mixed[0].devices == "1 h800 + 1 cpu-2-socket"


def test_without_a_network_there_is_one_machine() -> None:
    assert max(one.num_devices for one in candidates("l4:64")) == 8


def test_the_price_is_that_of_all_devices() -> None:
    one = next(one for one in candidates("h800:16", "h20:8", h20=1.5) if one.devices == "8 h20 + 16 h800")
    assert one.usd_per_hour == 8 * 1.5 + 16 * 2
    assert candidates("l20:8")[0].usd_per_hour is None


def test_a_file_says_the_same_of_a_deployment() -> None:
    for one in candidates("h800:16", "h20:8"):
        count = 1 if one.topology is None else 3
        deployment = one.deploy("fp8", "int4", count, rows=7, context_tokens=4096, description="a: b")
        values = format_deployment(deployment)
        assert "\n" in values
        read = parse_deployment(one.name, yaml.safe_load(values))
        if one.topology is None:
            deployment = dataclasses.replace(deployment, num_microbatches=read.num_microbatches)
        assert read == deployment


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("h800", "give HARDWARE:COUNT"),
        ("h800:0", "at least 1"),
        ("h800:x", "at least 1"),
        ("h80:8", "did you mean h800"),
    ],
)
def test_a_mistake_is_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pool(word, Prices({}))
