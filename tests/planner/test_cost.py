"""Device time and money per token: what must hold for any model and hardware."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.layout.hardware import Hardware, list_hardware, load_hardware
from step3_jax.planner.cost import Prices, attention_seconds, count_token_work, ffn_seconds
from step3_jax.planner.estimate import CostAnswer, Estimate, estimate_cost
from step3_jax.planner.shape import list_shapes, load_shape

MODELS = {name: load_shape(name) for name in list_shapes()}
HARDWARE = {name: load_hardware(name) for name in list_hardware()}
# Every device needs a price for USD to be compared.
PRICES = Prices({name: 0.5 + 0.25 * number for number, name in enumerate(HARDWARE)})
CONTEXTS = st.integers(1, 1 << 20)
KV_DTYPES = st.sampled_from(["fp8", "bfloat16", "int4"])


def answer(model: str, context: int, kv_dtype: str, *hardware: Hardware) -> CostAnswer:
    return estimate_cost(MODELS[model], context_tokens=context, kv_dtype=kv_dtype, candidates=hardware, prices=PRICES)


def usd(one: Estimate) -> tuple[float, float]:
    assert one.ideal_usd is not None
    assert one.expected_usd is not None
    return one.ideal_usd, one.expected_usd


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(HARDWARE)), KV_DTYPES, CONTEXTS, CONTEXTS)
def test_cost_never_falls_with_context(model: str, name: str, kv_dtype: str, first: int, second: int) -> None:
    short, long = (answer(model, context, kv_dtype, HARDWARE[name]) for context in sorted((first, second)))
    for one, other in ((short.pair, long.pair), (short.one_kind[0], long.one_kind[0])):
        assert all(left <= right * (1 + 1e-9) for left, right in zip(usd(one), usd(other), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(HARDWARE)),
    KV_DTYPES,
    CONTEXTS,
    st.floats(1, 10),
    st.floats(1, 10),
)
def test_cost_never_rises_with_a_better_device_of_the_same_price(
    model: str, name: str, kv_dtype: str, context: int, compute: float, bandwidth: float
) -> None:
    device = HARDWARE[name]
    better = dataclasses.replace(
        device,
        bandwidth_tb_s=device.bandwidth_tb_s * bandwidth,
        bf16_tflops=device.bf16_tflops * compute,
        fp8_tflops=None if device.fp8_tflops is None else device.fp8_tflops * compute,
    )
    before, after = (answer(model, context, kv_dtype, one).pair for one in (device, better))
    assert all(new <= old * (1 + 1e-9) for new, old in zip(usd(after), usd(before), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.sampled_from(sorted(HARDWARE)), min_size=1, max_size=4, unique=True),
    KV_DTYPES,
    CONTEXTS,
)
def test_afd_is_never_worse_than_the_same_pools_used_for_both(
    model: str, names: list[str], kv_dtype: str, context: int
) -> None:
    found = answer(model, context, kv_dtype, *(HARDWARE[name] for name in names))
    best = usd(found.one_kind[0])[0]
    assert usd(found.pair)[0] <= best * (1 + 1e-9)
    if len(names) == 1:
        assert usd(found.pair)[0] == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(HARDWARE)), KV_DTYPES, CONTEXTS)
def test_no_expectation_is_better_than_the_ideal(model: str, name: str, kv_dtype: str, context: int) -> None:
    found = answer(model, context, kv_dtype, HARDWARE[name])
    for one in (found.pair, found.one_kind[0]):
        ideal, expected = usd(one)
        assert ideal < expected


@pytest.mark.parametrize(
    ("context", "kv_dtype", "total"),
    [(8192, "fp8", 0.055), (32768, "fp8", 0.129), (32768, "int4", 0.106), (8192, "int4", 0.042)],
)
def test_the_releases_prices_come_out(context: int, kv_dtype: str, total: float) -> None:
    candidates = [HARDWARE[name] for name in ("h800", "h20", "a800", "910b")]
    found = estimate_cost(MODELS["step3"], context_tokens=context, kv_dtype=kv_dtype, candidates=candidates)
    assert found.pair.ideal_usd == pytest.approx(total, abs=0.0005)
    # A cache in four bits moves attention from H20, where FLOPs bind, to H800.
    assert found.pair.attention.hardware.name == ("h20" if kv_dtype == "fp8" else "h800")


def test_a_cache_in_four_bits_saves_nothing_where_flops_bind() -> None:
    shape, h20 = MODELS["step3"], HARDWARE["h20"]
    eight, four = (attention_seconds(count_token_work(shape, 32768, dtype), h20) for dtype in ("fp8", "int4"))
    assert four == eight


def test_a_bfloat16_cache_doubles_bytes_and_halves_the_rate_of_attention() -> None:
    eight, sixteen = (count_token_work(MODELS["dsv3"], 8192, dtype) for dtype in ("fp8", "bfloat16"))
    assert sixteen.kv_bytes == 2 * eight.kv_bytes
    h20 = HARDWARE["h20"]
    core = [attention_seconds(work, h20) - work.projection_flops / 296e12 for work in (eight, sixteen)]
    assert core[1] == pytest.approx(2 * core[0])


def test_without_a_price_devices_are_ranked_by_speed() -> None:
    candidates = [HARDWARE[name] for name in ("h20", "h200-sxm")]
    found = estimate_cost(MODELS["step3"], context_tokens=8192, kv_dtype="fp8", candidates=candidates)
    assert not found.is_by_price
    assert found.pair.ideal_usd is None
    assert [one.attention.hardware.name for one in found.one_kind] == ["h200-sxm", "h20"]
    assert found.pair.attention.hardware.name == "h200-sxm"


def test_a_context_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        count_token_work(MODELS["step3"], 0)


def test_the_ffn_does_not_depend_on_the_context() -> None:
    works = [count_token_work(MODELS["step3"], context) for context in (1, 100_000)]
    assert len({ffn_seconds(work, HARDWARE["h800"]) for work in works}) == 1
