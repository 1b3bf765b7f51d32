"""Which devices belong to which role; what does not fit is refused with what would."""

from __future__ import annotations

import dataclasses
import types
from typing import cast

import jax
import pytest

from step3_jax.afd import topology
from step3_jax.afd.topology import AfdTopology
from step3_jax.checkpoint.names import our_path
from step3_jax.config import ModelConfig, QuantConfig, TextConfig
from step3_jax.layout.deployment import parse_topology
from step3_jax.layout.parallel import Parallel
from step3_jax.layout.role import is_ffn

RELEASED = ModelConfig(vision=None, image_token_id=0)


def devices(count: int) -> list[jax.Device]:
    return cast(list[jax.Device], [types.SimpleNamespace(platform="cpu", id=number) for number in range(count)])


@pytest.mark.parametrize(
    ("spec", "each", "attention", "ffn", "pieces"),
    [("1a1f", 1, 1, 1, 1), ("2a2f", 8, 16, 16, 16), ("2a1f", 1, 2, 1, 2), ("2a3f", 2, 4, 6, 12)],
)
def test_attention_comes_first_and_roles_share_no_device(
    spec: str, each: int, attention: int, ffn: int, pieces: int
) -> None:
    found = AfdTopology.of(parse_topology(spec, each), devices=devices(64))
    assert (found.num_attention, found.num_ffn, found.num_pieces) == (attention, ffn, pieces)
    assert [device.id for device in found.devices] == list(range(attention + ffn))
    assert found.parallel == Parallel(found.instances.num_ffn, each, found.instances.num_ffn)


@pytest.mark.parametrize(
    ("spec", "each", "there", "message"),
    [
        ("2a2f", 8, 8, "needs 32 devices, and there are 8 .cpu.: it fits with --afd-devices 2"),
        ("4a2f", 1, 4, "needs 6 devices, and there are 4 .*: 2a2f fits with --afd-devices 1"),
        ("1a3f", 1, 3, "2a1f fits"),
        ("1a1f", 1, 1, "leave out --afd"),
    ],
)
def test_too_few_devices_are_refused_with_what_would_fit(spec: str, each: int, there: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AfdTopology.of(parse_topology(spec, each), devices=devices(there))


def test_an_ffn_side_on_cpus_beside_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [types.SimpleNamespace(platform="gpu", id=number) for number in range(2)]
    cpus = devices(4)
    monkeypatch.setattr(topology, "find_cpu_devices", lambda count: cpus[:count])
    found = AfdTopology.of(parse_topology("2a1f"), devices=cast(list[jax.Device], cards), ffn_device="cpu")
    assert [device.platform for device in found.devices] == ["gpu", "gpu", "cpu"]
    assert (found.ffn_platform, found.is_mixed) == ("cpu", True)
    same = AfdTopology.of(parse_topology("1a1f"), devices=cpus, ffn_device="cpu")
    assert ([device.id for device in same.devices], same.is_mixed) == ([0, 1], False)


def test_a_parallel_of_another_number_of_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2 device.* dp x tp must be 2"):
        AfdTopology.of(parse_topology("1a2f"), Parallel(1, 4, 1), devices(8))


def test_the_released_model_fits_the_papers_deployment() -> None:
    quantised = dataclasses.replace(RELEASED, quantization=QuantConfig())
    found = AfdTopology.of(parse_topology("2a2f", 8), devices=devices(32))
    found.check(RELEASED)
    found.check(quantised)
    # Widths of 5120 are 40 FP8 blocks, which cannot be divided among 16 devices; experts can.
    with pytest.raises(ValueError, match=r"whole FP8 blocks of 128.*give tp 1 ep 2 or .*tp 8 ep 2"):
        AfdTopology.of(parse_topology("2a2f", 8), Parallel(1, 16, 1), devices(32)).check(quantised)
    AfdTopology.of(parse_topology("2a2f", 8), Parallel(16, 1, 16), devices(32)).check(quantised)


def test_heads_do_not_limit_the_ffn_side() -> None:
    text = TextConfig(
        num_hidden_layers=1, moe_layers=(), num_attention_heads=1, head_dim=2, intermediate_size=6, hidden_size=4
    )
    config = ModelConfig(text=text, vision=None, image_token_id=0)
    AfdTopology.of(parse_topology("1a3f"), Parallel(1, 3, 1), devices(4)).check(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("model.layers.4.moe.gate.weight", False),
        ("model.layers.4.self_attn.o_proj.weight", False),
        ("vision_model.transformer.layers.0.mlp.fc1.weight", False),
        ("model.layers.4.moe.gate_proj.weight", True),
        ("model.layers.4.share_expert.up_proj.weight", True),
        ("model.layers.0.mlp.down_proj.weight", True),
    ],
)
def test_each_weight_has_one_role(name: str, expected: bool) -> None:
    assert is_ffn(our_path(name)) is expected
