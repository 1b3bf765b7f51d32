"""Shares of the roofline reached by measured runs, and what they predict."""

from __future__ import annotations

import json
import pathlib
import statistics

import pytest

from step3_jax.layout.hardware import list_hardware, load_hardware
from step3_jax.planner.cost import attention_seconds, count_token_work, ffn_seconds, peak_flops
from step3_jax.planner.efficiency import (
    attention_share,
    base_kernel_share,
    base_run,
    cross_check,
    ffn_share,
    fit_shares,
    kernel_share,
    predict_rate,
)
from step3_jax.planner.published import AFD, ARRANGEMENTS, EP, load_processor_shares, load_runs
from step3_jax.planner.shape import load_shape
from tests.process import ROOT


@pytest.mark.parametrize(
    ("design", "device", "short", "long"),
    [
        ("mfa", "h800", 0.75, 0.87),
        ("mfa", "h20", 0.70, 0.69),
        ("mfa", "a800", 0.66, 0.78),
        ("mla", "h800", 0.63, 0.69),
        # By the smaller count of MLA's FLOPs; by the report's it would be 0.90 and 0.88.
        ("mla", "h20", 0.85, 0.84),
        ("gqa", "h800", 0.85, 0.93),
        ("gqa", "h20", 0.37, 0.36),
        ("gqa", "a800", 0.70, 0.72),
    ],
)
def test_layers_of_table_9_reach_these_shares_of_their_roofline(
    design: str, device: str, short: float, long: float
) -> None:
    for context, share in ((8192, short), (32768, long)):
        found = kernel_share(design, load_hardware(device), context)
        assert found.value == pytest.approx(share, abs=0.006)
        assert found.is_measured


def test_between_two_measured_contexts_the_share_lies_between_theirs() -> None:
    h800 = load_hardware("h800")
    low, middle, high = (kernel_share("mfa", h800, context).value for context in (8192, 16384, 32768))
    assert middle == pytest.approx((low + high) / 2)
    assert kernel_share("mfa", h800, 1).value == low
    assert kernel_share("mfa", h800, 1e6).value == high


@pytest.mark.parametrize("name", sorted(load_runs()))
def test_a_run_is_predicted_by_its_own_shares(name: str) -> None:
    run = load_runs()[name]
    shares = fit_shares(run)
    assert 0 < shares.attention < 1
    assert 0 < shares.ffn < 1
    assert predict_rate(run, shares) == pytest.approx(run.tokens_per_s_per_device)


def test_one_row_of_table_8_predicts_the_other_two_with_this_error() -> None:
    errors = {(fitted.name, other.name): error for fitted, other, error in cross_check(AFD)}
    assert errors["step3-2a2f", "step3-4a2f"] == pytest.approx(0.019, abs=0.001)
    # BF16 attention reached a larger share than FP8 attention, which shares by design and device alone cannot express.
    assert errors["step3-2a2f", "step3-3a2f"] == pytest.approx(-0.196, abs=0.001)
    assert errors["step3-3a2f", "step3-2a2f"] == pytest.approx(0.044, abs=0.001)
    assert max(abs(error) for error in errors.values()) < 0.22


def test_one_deployment_of_deepseek_predicts_the_others_at_its_latency_within_a_tenth() -> None:
    errors = {(fitted.name, other.name): error for fitted, other, error in cross_check(EP)}
    # At 256 sequences of 2,000 tokens per GPU the prediction needs all of an interface, and shares ignore the network.
    usual = {pair: error for pair, error in errors.items() if "dsv3-sglang-2k" not in pair}
    assert len(usual) == 12
    assert max(abs(error) for error in usual.values()) < 0.1
    assert errors["dsv3-profile", "dsv3-sglang-2k"] == pytest.approx(0.468, abs=0.002)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("design", ["mfa", "mla", "gqa", "linear", "hybrid"])
def test_a_deployment_never_reaches_more_than_its_kernel(design: str, arrangement: str) -> None:
    # Processors have shares of their own, of layers.
    for hardware in (one for one in map(load_hardware, list_hardware()) if not one.is_host):
        share = attention_share(design, hardware, context_tokens=8192, arrangement=arrangement)
        assert 0 < share.value <= kernel_share(design, hardware, 8192).value
        assert 0 < ffn_share(hardware, arrangement=arrangement).value < 1
        assert share.source


def test_what_is_carried_over_says_so() -> None:
    h800, b200 = load_hardware("h800"), load_hardware("b200")
    assert attention_share("mfa", h800, context_tokens=4096).is_measured
    assert not attention_share("gqa", h800, context_tokens=4096).is_measured
    assert "fp8 caches to int4" in attention_share("mfa", h800, context_tokens=4096, kv_dtype="int4").source
    assert "b200" in ffn_share(b200).source
    assert not ffn_share(b200).is_measured


def test_the_share_depends_on_the_design_not_on_the_device_alone() -> None:
    """One number per device would be off by a factor of two for grouped-query attention on H20."""
    h20 = load_hardware("h20")
    mfa, gqa = (attention_share(design, h20, context_tokens=8192).value for design in ("mfa", "gqa"))
    assert 1.8 < mfa / gqa < 2.2


def test_every_kv_dtype_has_a_run_of_each_arrangement() -> None:
    for arrangement in ARRANGEMENTS:
        for kv_dtype in ("fp8", "bfloat16", "int4"):
            run = base_run(arrangement, kv_dtype)
            assert run.arrangement == arrangement
            assert base_kernel_share(run).is_measured


@pytest.mark.parametrize("name", sorted(load_runs()))
def test_the_page_has_the_shares_of_each_run(name: str) -> None:
    run = load_runs()[name]
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    work = count_token_work(load_shape(run.model), run.context_tokens, run.kv_dtype)
    hardware = load_hardware(run.hardware)
    of_ideal = run.tokens_per_s_per_device * (attention_seconds(work, hardware) + ffn_seconds(work, hardware))
    shares = fit_shares(run)
    cells = [f"{shares.attention:.0%}", f"{shares.ffn:.0%}"][: 1 if run.arrangement == EP else 2]
    end = f"| {run.tokens_per_s_per_device:,.0f} | {of_ideal:.0%} | {' / '.join(cells)} |"
    assert end.replace("%", " %") in text


def test_processors_have_the_shares_that_the_benchmarks_have() -> None:
    layers, decode = (
        json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
        for name in ("time-layers.json", "decode-cpu.json")
    )
    read = layers["conditions"]["read_gb_s"]

    def reached(kind: str) -> float:
        return statistics.mean(row["gb_s"] / read for row in layers["layers"] if row["name"].startswith(kind))

    prompts = [
        row["share_of_gemm"]
        for row in decode["prefill"]
        if row["dtype"] == "float32" and row["quantization"] in ("none", "fp8", "int8") and row["tokens"] == 512
    ]
    assert len(prompts) == 3
    found = load_processor_shares()
    assert found.attention == pytest.approx(reached("attention"), abs=0.006)
    assert found.ffn == pytest.approx(reached("experts"), abs=0.006)
    assert found.products == pytest.approx(statistics.mean(prompts), abs=0.006)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_processors_do_not_reach_what_accelerators_do(arrangement: str) -> None:
    host, measured = load_hardware("cpu-2-socket-384gb"), load_processor_shares()
    attention = attention_share("mfa", host, context_tokens=8192, arrangement=arrangement)
    ffn = ffn_share(host, arrangement=arrangement)
    assert (attention.value, ffn.value) == (measured.attention, measured.ffn)
    for share in (attention, ffn):
        assert "time-layers.json" in share.source
        assert "h800" not in share.source
        assert not share.is_measured


def test_a_processors_peak_is_that_of_products_in_vector_registers() -> None:
    # Two units of 16 numbers, each a product and a sum.
    host = load_hardware("cpu-2-socket-384gb")
    assert peak_flops(host) == pytest.approx(2 * 56 * 2.0e9 * 2 * 16 * 2, rel=0.01)
    assert host.int8_tops is None
