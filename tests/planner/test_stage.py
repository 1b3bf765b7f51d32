"""The stages' arithmetic against sums by hand and against the deployments of arXiv 2507.19427."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import parse_deployment
from step3_jax.layout.hardware import Hardware, load_hardware
from step3_jax.layout.parallel import BOTH, Parallel
from step3_jax.layout.role import Role, deployed_config
from step3_jax.planner.context import parse_contexts
from step3_jax.planner.efficiency import base_run
from step3_jax.planner.expectation import NETWORK_SHARE, expect
from step3_jax.planner.expert_load import even_load
from step3_jax.planner.pipeline import BACK, SEND, Machines, count_decode, count_prefill
from step3_jax.planner.published import AFD, load_runs
from step3_jax.planner.shape import load_shape
from step3_jax.planner.stage import PROJECTIONS, Arithmetic, Model, Shares, stage_seconds

SHAPE = load_shape("step3")
CONFIG = deployed_config(ModelConfig.preset("step3"), "fp8")
H800, L20, L4 = (load_hardware(name) for name in ("h800", "l20", "l4"))
# Per layer, in three stages of 50 ms: report, section 3.1.
STAGE_S = 16.6e-3 / 61


def model(context: str, kv_cache: str = "fp8") -> Model:
    return Model(CONFIG, "fp8", kv_cache, parse_contexts(context), even_load(CONFIG.text))


def apart(num_attention: int, num_ffn: int, hardware: str = "h800") -> Machines:
    device = load_hardware(hardware)
    values = {"afd": f"{num_attention}a{num_ffn}f", "devices_per_instance": 8}
    return Machines.of(parse_deployment("apart", values), device, device)


def both(parallel: Parallel, hardware: Hardware) -> Machines:
    role = Role(BOTH, parallel.num_devices, parallel)
    return Machines(hardware, hardware, role, role, 0)


def test_attention_reads_the_cache_and_its_weights_once() -> None:
    rows = np.array([128.0])
    stages = count_decode(Arithmetic(model("4k"), by_chance=False), apart(2, 2), rows, Shares())
    core = stages.attention["core attention"]
    assert core.is_memory.all()
    assert core.seconds == pytest.approx(128 * 4096 * 31_720 / 3.35e12)
    # 169.35 M weights per layer (formulas of the report, section 3), plus FP8 scales, norms and routers.
    assert stages.attention[PROJECTIONS].seconds == pytest.approx(61 * 169.35e6 / 3.35e12, rel=0.01)


def test_the_network_carries_what_the_report_says() -> None:
    """2A2F with 2,048 tokens per micro-batch: 256 tokens reach each FFN device, as 7,168 bytes and what describes them."""
    machines = dataclasses.replace(apart(2, 2), ffn=dataclasses.replace(H800, link_gb_s=1e6))
    stages = count_decode(Arithmetic(model("4k"), by_chance=False), machines, np.array([128.0]), Shares())
    sent, returned = stages.send[0] * 50e9 / 61, stages.back[0] * 50e9 / 61
    assert sent == pytest.approx(256 * 7410)
    assert sent == pytest.approx(1_835_008, rel=0.04)
    assert returned == pytest.approx(3_670_016)


def test_tokens_go_to_every_ffn_instance() -> None:
    fast = dataclasses.replace(H800, link_gb_s=1e6)
    arithmetic = Arithmetic(model("4k"), by_chance=False)
    few, many = (
        count_decode(arithmetic, dataclasses.replace(apart(1, count), ffn=fast), np.array([64.0]), Shares())
        for count in (1, 6)
    )
    assert many.send == pytest.approx(6 * few.send)
    assert many.back == pytest.approx(6 * few.back)


def test_the_attention_of_l20_has_fewer_sequences_than_the_report_as_o_proj_is_copied() -> None:
    """Report, section 6: 41 sequences of 8,000 tokens, with o-proj sharded over the 8 cards of a server."""
    machines = apart(2, 6, "l20")
    rows = np.arange(1.0, 64)
    stages = count_decode(Arithmetic(model("8000"), by_chance=False), machines, rows, Shares())
    core, projections = stages.attention["core attention"].seconds, stages.attention[PROJECTIONS].seconds
    assert np.count_nonzero(core + projections <= 61 * STAGE_S) == 15
    saved = 61 * 117.44e6 * 7 / 8 / 864e9
    assert np.count_nonzero(core + projections - saved <= 61 * STAGE_S) == 40


def test_the_ffn_of_l20_needs_the_servers_of_the_report() -> None:
    """Report, section 6: at half of the bandwidth, 6 servers of 8 L20 read 117 MB of weights each in a stage."""
    budget = L20.bandwidth_tb_s * 1e12 * STAGE_S / 2
    assert budget == pytest.approx(117.5e6, rel=0.001)
    arithmetic = Arithmetic(model("8000"), by_chance=False)
    four, six = (sum(arithmetic.weight_parts(apart(1, count).ffn_role).values()) / 61 for count in (4, 6))
    assert six == pytest.approx(budget, rel=0.01)
    assert four > 1.3 * budget


def test_the_ffn_of_l4_does_not_come_down_to_the_reports_cards() -> None:
    """Report, section 6: 144 cards, or 128 by the arithmetic of L20; here each server has a copy of the shared expert."""
    budget = L4.bandwidth_tb_s * 1e12 * STAGE_S / 2
    arithmetic = Arithmetic(model("8000"), by_chance=False)
    weights = sum(arithmetic.weight_parts(apart(1, 16).ffn_role).values()) / 61
    assert weights > 1.2 * budget


def test_the_run_that_shares_are_taken_from_comes_out_as_measured() -> None:
    for kv_cache, machines in (("fp8", apart(2, 2)), ("bfloat16", apart(3, 2))):
        run = base_run(AFD, kv_cache)
        shares = expect(machines, SHAPE, run.context_tokens, kv_cache).shares
        arithmetic = Arithmetic(model(str(run.context_tokens), kv_cache), by_chance=True)
        stages = count_decode(arithmetic, machines, np.array([run.sequences_per_device]), shares)
        step_s = run.sequences / (run.tokens_per_s_per_device * run.num_devices)
        assert stages.step_seconds(run.micro_batches) == pytest.approx(step_s, rel=1e-6)


def test_the_run_at_8k_is_predicted_from_that_at_4k() -> None:
    run = load_runs()["step3-4a2f"]
    shares = expect(apart(4, 2), SHAPE, 8192, "fp8").shares
    stages = count_decode(
        Arithmetic(model("8192"), by_chance=True), apart(4, 2), np.array([run.sequences_per_device]), shares
    )
    step_s = run.sequences / (run.tokens_per_s_per_device * run.num_devices)
    assert stages.step_seconds(3) == pytest.approx(step_s, rel=0.02)


def test_no_step_is_shorter_than_any_of_its_stages() -> None:
    rows = np.arange(1.0, 200)
    for by_chance in (False, True):
        stages = count_decode(Arithmetic(model("8k"), by_chance=by_chance), apart(2, 3), rows, Shares())
        for count in (1, 2, 3, 4):
            step_s = stages.step_seconds(count)
            for stage_s in (stage_seconds(stages.attention), stage_seconds(stages.ffn), stages.send, stages.back):
                assert (step_s >= count * stage_s).all()
            assert (np.diff(step_s) >= 0).all()


def test_one_micro_batch_waits_for_every_stage() -> None:
    stages = count_decode(Arithmetic(model("8k"), by_chance=False), apart(1, 1), np.array([64.0]), Shares())
    whole = stage_seconds(stages.attention) + stage_seconds(stages.ffn) + stages.send + stages.back
    assert stages.step_seconds(1) == pytest.approx(whole)
    assert stages.step_seconds(4) < 4 * whole
    assert "round trip" in stages.find_binding(1, 0)


def test_what_binds_is_named() -> None:
    shares = expect(apart(2, 2), SHAPE, 32768, "fp8").shares
    decode = Arithmetic(model("32k"), by_chance=True)
    stages = count_decode(decode, apart(2, 2), np.array([64.0]), shares)
    assert stages.find_binding(3, 0) == "attention side: reading the KV cache"
    stages = count_decode(decode, apart(16, 1), np.array([1.0]), shares)
    assert stages.find_binding(3, 0) == "FFN side: reading the weights of routed experts"
    slow = dataclasses.replace(H800, network_gb_s=1)
    machines = dataclasses.replace(apart(2, 2), attention=slow, ffn=slow)
    stages = count_decode(decode, machines, np.array([64.0]), Shares(network=NETWORK_SHARE))
    assert stages.find_binding(4, 0) == BACK
    assert stages.find_busy(4)[SEND] < stages.find_busy(4)[BACK]


def test_devices_that_do_both_take_no_less_than_their_exchanges() -> None:
    slow = dataclasses.replace(H800, network_gb_s=0.5)
    parallel = Parallel(16, 1, 16)
    rows = np.array([64.0])
    arithmetic = Arithmetic(model("4k"), by_chance=False)
    near, far = (count_decode(arithmetic, both(parallel, one), rows, Shares()) for one in (H800, slow))
    assert far.step_seconds(1) == pytest.approx(far.send)
    assert far.step_seconds(1) > near.step_seconds(1)
    assert far.find_binding(1, 0) == "exchange between devices"


def test_tokens_go_to_the_groups_of_their_experts_between_machines() -> None:
    """32 devices, 16 groups of two: one of a token's three experts is in a group with 1 - (15/16)^3; room is twice that."""
    rows, fast = np.array([64.0]), dataclasses.replace(H800, link_gb_s=1e6)
    stages = count_decode(Arithmetic(model("4k"), by_chance=False), both(Parallel(32, 1, 16), fast), rows, Shares())
    room = 2 * (1 - (15 / 16) ** 3)
    # Both directions in BF16, to the 24 devices of the other machines.
    assert stages.send == pytest.approx(2 * 56 * 64 * room * 24 * 7168 * 2 / 50e9)


def test_one_group_of_a_machine_exchanges_what_its_shards_need() -> None:
    """Eight devices: o-proj in all layers, tokens and sums of 56 layers with experts and 5 without, the head."""
    stages = count_decode(
        Arithmetic(model("4k"), by_chance=False), both(Parallel(1, 8, 8), H800), np.array([64.0]), Shares()
    )
    numbers = 61 * (64 * 256 * 7 / 8 + 7168 * 7) + 2 * 61 * 7168 * 7 + 7168 * 7 + 128_815 * 7 / 8
    assert stages.send == pytest.approx(64 * numbers * 2 / 200e9)


def test_prefilling_takes_longer_for_longer_prompts_and_more_tokens() -> None:
    arithmetic = Arithmetic(model("8k"), by_chance=False)

    def seconds(tokens: float, prompt: float) -> float:
        return float(count_prefill(arithmetic, apart(2, 2), tokens, prompt, Shares()).step_seconds(3)[0])

    assert seconds(256, 4096) < seconds(512, 4096) < seconds(512, 65_536)


def test_the_processor_of_a_machine_is_reached_over_the_links_of_its_accelerators() -> None:
    host = load_hardware("cpu-2-socket")
    assert host.is_host
    assert not H800.is_host
    values = {"afd": "4a1f", "devices_per_instance": 1}
    machines = Machines.of(parse_deployment("mixed", values), H800, host)
    assert machines.rates == (host.link_gb_s, 4 * host.link_gb_s)


def test_machines_without_a_network_are_refused() -> None:
    with pytest.raises(ValueError, match="l4 has no network to other machines"):
        _ = apart(1, 1, "l4").rates
    with pytest.raises(ValueError, match="l4 has no network to other machines"):
        count_decode(Arithmetic(model("4k"), by_chance=False), both(Parallel(2, 8, 16), L4), np.ones(1), Shares())
