"""What docs/planning.md says about the release's claims: every figure that follows from arithmetic is computed here."""

from __future__ import annotations

import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.hardware import load_hardware
from step3_jax.planner.cost import (
    attention_bound,
    attention_seconds,
    count_token_work,
    ffn_seconds,
    peak_flops,
    usd_per_million_tokens,
)
from step3_jax.planner.published import load_runs
from step3_jax.planner.shape import load_shape

SHORT, LONG = 8192, 32768
REPORTED = ("h800", "h20", "a800", "910b")


def attention(model: str, context: int, name: str, kv_dtype: str = "fp8") -> float:
    hardware = load_hardware(name)
    seconds = attention_seconds(count_token_work(load_shape(model), context, kv_dtype), hardware)
    return usd_per_million_tokens(seconds, hardware.usd_per_hour or 0.0)


def ffn(model: str, name: str) -> float:
    hardware = load_hardware(name)
    seconds = ffn_seconds(count_token_work(load_shape(model), 1), hardware)
    return usd_per_million_tokens(seconds, hardware.usd_per_hour or 0.0)


def total(model: str, context: int, first: str, second: str | None = None) -> float:
    return attention(model, context, first) + ffn(model, second or first)


def test_1_and_3_prices_of_step3_and_v3() -> None:
    assert total("dsv3", LONG, "h800") == pytest.approx(0.211, abs=5e-4)
    assert total("step3", LONG, "h20", "h800") == pytest.approx(0.129, abs=5e-4)
    assert total("step3", SHORT, "h20", "h800") == pytest.approx(0.055, abs=5e-4)


def test_2_qwen3_moe_needs_h20_for_its_price() -> None:
    assert total("qwen3-moe", LONG, "h20", "h800") == pytest.approx(0.193, abs=5e-4)
    assert total("qwen3-moe", LONG, "h800") == pytest.approx(0.535, abs=5e-4)


def test_4_the_share_of_v3s_cost() -> None:
    assert total("step3", SHORT, "h20", "h800") / total("dsv3", SHORT, "h800") == pytest.approx(0.813, abs=5e-4)
    assert total("step3", LONG, "h20", "h800") / total("dsv3", LONG, "h800") == pytest.approx(0.61, abs=5e-3)


def test_5_less_than_qwen3_moe_by_11_percent() -> None:
    ratio = total("step3", SHORT, "h20", "h800") / total("qwen3-moe", SHORT, "h20", "h800")
    assert 1 - ratio == pytest.approx(0.110, abs=5e-4)
    assert 1 / ratio - 1 == pytest.approx(0.123, abs=1e-3)


def test_6_the_share_of_v3s_cost_on_h20() -> None:
    assert total("step3", LONG, "h20") / total("dsv3", LONG, "h20") == pytest.approx(0.310, abs=5e-4)
    assert attention("step3", LONG, "h20") / attention("dsv3", LONG, "h20") == pytest.approx(0.248, abs=5e-4)


def test_7_step3_is_cheapest_everywhere_but_on_h20_at_8k() -> None:
    dearer = [
        (name, context, model)
        for name in REPORTED
        for context in (SHORT, LONG)
        for model in ("dsv3", "qwen3-moe")
        if total("step3", context, name) >= total(model, context, name)
    ]
    assert dearer == [("h20", SHORT, "qwen3-moe")]


def test_8_below_pangu_on_910b() -> None:
    for context, ours, theirs in ((SHORT, 0.079, 0.114), (LONG, 0.168, 0.395)):
        assert total("step3", context, "910b") == pytest.approx(ours, abs=5e-4)
        # Printed as a sum of rounded cells.
        assert total("pangu-pro-moe", context, "910b") == pytest.approx(theirs, abs=6e-4)


def test_9_throughput_beside_v3s() -> None:
    runs = load_runs()
    rate = runs["step3-2a2f"].tokens_per_s_per_device
    assert rate / runs["dsv3-profile"].tokens_per_s_per_device == pytest.approx(1.738, abs=1e-3)
    assert pytest.approx(1.68, abs=5e-3) == 3910 / 2324


def test_12_and_13_bytes_and_flops_beside_v3_and_qwen3_moe() -> None:
    step3, v3, qwen = (count_token_work(load_shape(name), SHORT) for name in ("step3", "dsv3", "qwen3-moe"))
    assert step3.kv_bytes / v3.kv_bytes == pytest.approx(0.889, abs=5e-4)
    assert step3.attention_flops / v3.attention_flops == pytest.approx(0.22, abs=5e-3)
    assert step3.attention_flops / qwen.attention_flops == pytest.approx(1.30, abs=5e-3)
    assert step3.kv_bytes / qwen.kv_bytes == pytest.approx(0.32, abs=5e-3)


def test_15_and_16_a800_beside_h800() -> None:
    assert attention("step3", SHORT, "a800") - attention("step3", SHORT, "h800") == pytest.approx(-0.008, abs=5e-4)
    assert attention("step3", LONG, "a800") - attention("step3", LONG, "h800") == pytest.approx(-0.055, abs=5e-4)
    assert total("step3", SHORT, "a800") - total("step3", SHORT, "h800") == pytest.approx(0.013, abs=5e-4)
    assert total("step3", LONG, "a800") - total("step3", LONG, "h800") == pytest.approx(-0.0345, abs=5e-4)
    ratios = [total("dsv3", context, "a800") / total("dsv3", context, "h800") for context in (SHORT, LONG)]
    assert ratios == [pytest.approx(2.16, abs=0.02), pytest.approx(2.09, abs=0.02)]


def test_18_halved_attention_instances() -> None:
    gains = [(x + 2) / (x / 2 + 2) for x in (2, 4, 16)]
    assert gains == [pytest.approx(4 / 3), pytest.approx(3 / 2), pytest.approx(1.8)]


def test_19_a_cache_in_four_bits() -> None:
    saved = {
        name: 1 - attention("step3", LONG, name, "int4") / attention("step3", LONG, name, "fp8") for name in REPORTED
    }
    assert saved == {
        "h800": pytest.approx(0.48, abs=5e-3),
        "h20": 0,
        "a800": pytest.approx(0.16, abs=5e-3),
        "910b": pytest.approx(0.24, abs=5e-3),
    }


def test_21_one_attention_gpu_holds_64_sequences_of_32k_in_fp8_alone() -> None:
    shape = load_shape("step3")
    cache = [64 * shape.kv_bytes_held(LONG, kv_dtype) / 1e9 for kv_dtype in ("fp8", "bfloat16")]
    assert cache == [pytest.approx(65.5, abs=0.05), pytest.approx(131.0, abs=0.05)]


def test_23_and_24_intensity_and_length() -> None:
    work = count_token_work(load_shape("step3"), SHORT)
    assert work.attention_flops / work.kv_bytes == 128
    ridges = {name: peak_flops(load_hardware(name)) / load_hardware(name).bandwidth_tb_s / 1e12 for name in REPORTED}
    assert {name: round(ridge) for name, ridge in ridges.items()} == {"h800": 591, "h20": 74, "a800": 156, "910b": 175}
    assert attention_bound(work, load_hardware("h20")) == "compute"
    for name in ("step3", "qwen3-moe"):
        works = [count_token_work(load_shape(name), context).attention_flops for context in (SHORT, 2 * SHORT)]
        assert works[1] == 2 * works[0]


def test_14_and_25_rank_and_stage() -> None:
    text = ModelConfig.preset("step3").text
    assert text.num_attention_heads * text.head_dim == 16384
    assert 16.6e3 / text.num_hidden_layers == pytest.approx(272, abs=0.5)
