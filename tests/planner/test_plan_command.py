"""`step3 plan memory`: what the compiled programs say, and the command around it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.cli.main import main
from step3_jax.cli.plan_process import compile_deployment
from step3_jax.config import ModelConfig, TextConfig, VisionConfig
from step3_jax.layout.count import weight_bytes
from step3_jax.layout.deployment import Deployment, load_deployment, parse_deployment
from step3_jax.layout.page import kv_bytes_per_token
from step3_jax.layout.role import deployed_config, roles_of
from step3_jax.planner.memory import CacheShape, plan_memory, shape_cache
from step3_jax.planner.memory_table import to_lines
from step3_jax.sampling.speculation import Speculation
from tests.process import ROOT, environment

# Sizes that split into whole FP8 blocks of 128, twice; a vocabulary that does not.
SMALL = ModelConfig(
    text=TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=64,
        share_q_dim=128,
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=256,
        share_expert_dim=256,
        moe_layers=(1, 2, 3),
        vocab_size=301,
    ),
    vision=VisionConfig(
        # Three heads cannot be divided among two devices.
        hidden_size=96,
        output_hidden_size=64,
        image_size=56,
        intermediate_size=128,
        num_attention_heads=3,
        num_hidden_layers=2,
    ),
    image_token_id=300,
    image_token_len=1,
)


def check(deployment: Deployment, cache: CacheShape, speculation: Speculation | None = None) -> None:
    """The compiled bytes are those of the arithmetic, to the byte."""
    config = deployed_config(SMALL, deployment.weights)
    found = compile_deployment(config, deployment, cache, speculation)
    for role in roles_of(deployment):
        assert found.roles[role.name].weights == sum(weight_bytes(config, deployment.weights, role).values())
        tokens = cache.num_pages * PAGE_SIZE if role.has_cache else 0
        assert found.roles[role.name].kv_tokens == tokens
        assert found.roles[role.name].kv_cache == tokens * kv_bytes_per_token(config.text, deployment.kv_cache)
        has_history = speculation is not None and role.has_cache
        assert found.roles[role.name].history == (4 * tokens * role.num_devices if has_history else 0)


def test_compiled_bytes_of_a_deployment_that_does_both_are_those_of_the_arithmetic() -> None:
    parallel = {"dp": 2, "tp": 2, "ep": 2}
    values = {"afd": "off", "devices": 4, "parallel": parallel, "weights": "fp8", "kv_cache": "int4"}
    check(parse_deployment("four", values), CacheShape(3, 2))


def test_compiled_bytes_of_disjoint_roles_are_those_of_the_arithmetic() -> None:
    values = {"afd": "1a1f", "devices_per_instance": 2, "ffn": {"tp": 1, "ep": 2}, "weights": "bfloat16"}
    check(parse_deployment("pair", values | {"kv_cache": "fp8", "payload": "fp8"}), CacheShape(6, 2))


@pytest.mark.parametrize("afd", [None, {"afd": "1a1f", "devices_per_instance": 2, "ffn": {"tp": 1, "ep": 2}}])
def test_compiled_bytes_with_guesses_are_those_of_the_arithmetic(afd: dict[str, object] | None) -> None:
    values = afd or {"afd": "off", "devices": 2, "parallel": {"dp": 1, "tp": 2, "ep": 2}}
    values = values | {"weights": "bfloat16", "kv_cache": "fp8"}
    check(parse_deployment("guesses", values), CacheShape(3, 2), Speculation(num_speculative_tokens=2))


def test_a_side_on_cpus_is_not_compiled() -> None:
    values = {"afd": "1a1f", "weights": "fp8", "kv_cache": "fp8", "ffn_device": "cpu"}
    deployment, cache = parse_deployment("mixed", values), CacheShape(2, 1)
    config = deployed_config(SMALL, deployment.weights)
    found = compile_deployment(config, deployment, cache).roles
    attention, _ = roles_of(deployment)
    assert set(found) == {"attention"}
    assert found["attention"].weights == sum(weight_bytes(config, deployment.weights, attention).values())
    plan = plan_memory(SMALL, deployment, memory_gib=None, compiled=found)
    rows = {line[:28].strip(): line[28:].split() for line in to_lines(plan)}
    assert rows["found by"] == ["compiled", "arithmetic"]
    assert "KV cache (compiled)" in rows


def test_nothing_is_compiled_for_a_server_without_accelerators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", "cpu-384gb", "--json"]) == 0
    said = capsys.readouterr()
    assert "the devices are CPUs: only arithmetic, nothing is compiled" in said.err
    assert json.loads(said.out)["compilation"] is None


# Numbers of the released model: width, heads x head size, low-rank query, head size, expert width, layers (5 of them dense).
WIDTH, QUERY, RANK, HEAD, EXPERT, LAYERS, DENSE = 7168, 64 * 256, 2048, 256, 5120, 61, 5
VOCABULARY, DENSE_WIDTH, NUM_EXPERTS = 128_815, 18_432, 48
# Vision tower and projector in bfloat16, from the released checkpoint's index.
VISION_BYTES = 9_350_749_184


PHASES = ("decode", "prefill", "image")


def count_fp8(*shapes: tuple[int, int]) -> int:
    """Bytes of matrices in FP8, with a float32 scale for each 128 x 128."""
    return sum(rows * columns + 4 * -(-rows // 128) * -(-columns // 128) for rows, columns in shapes)


def count_sides() -> tuple[int, int]:
    """Bytes of the weights outside the feed-forward halves, and of these."""
    attention = count_fp8((RANK, WIDTH), (HEAD, WIDTH), (HEAD, WIDTH), (QUERY, RANK), (WIDTH, QUERY)) * LAYERS
    norms = 2 * ((2 * WIDTH + RANK) * LAYERS + WIDTH)
    routers = 2 * NUM_EXPERTS * WIDTH * (LAYERS - DENSE)
    ends = 2 * 2 * VOCABULARY * WIDTH
    expert = count_fp8((EXPERT, WIDTH), (EXPERT, WIDTH), (WIDTH, EXPERT))
    dense = count_fp8((DENSE_WIDTH, WIDTH), (DENSE_WIDTH, WIDTH), (WIDTH, DENSE_WIDTH))
    ffn = DENSE * dense + (LAYERS - DENSE) * (NUM_EXPERTS + 1) * expert
    return attention + norms + routers + ends + VISION_BYTES, ffn


@pytest.mark.parametrize(
    ("name", "memory_gib", "weights"),
    [
        (
            "1gpu-48gb-cpu-384gb",
            {"attention": 44.9, "ffn": 384},
            dict(zip(("attention", "ffn"), count_sides(), strict=True)),
        ),
        ("cpu-384gb", {"both": 384}, {"both": sum(count_sides())}),
    ],
)
def test_what_is_said_of_deployments_with_cpus_is_what_another_count_gives(
    capsys: pytest.CaptureFixture[str], name: str, memory_gib: dict[str, float], weights: dict[str, int]
) -> None:
    assert main(["plan", "memory", name, "--no-compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    roles = found["roles"]
    assert {side: one["weights"] for side, one in roles.items()} == weights
    # A key and a value with a scale each in every layer.
    token = LAYERS * 2 * (HEAD + 4)
    assert {one["kv_per_token"] for side, one in roles.items() if side != "ffn"} == {token}
    for side, one in roles.items():
        budget = int(memory_gib[side] * 2**30 * 0.95)
        assert abs(one["budget"] - budget) <= 1
        left = budget - weights[side] - max(0.03 * budget, *(one["workspace_estimate"][part] for part in PHASES))
        assert one["left_for_kv_cache"] == pytest.approx(left, abs=2)
        if side != "ffn":
            assert found["kv_tokens"] == pytest.approx(left // (64 * token) * 64, abs=64)
    assert found["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2a2f", "8gpu-fp8-48gb", "16gpu-bf16-80gb"])
def test_the_full_model_is_compiled_in_little_memory(name: str) -> None:
    deployment = load_deployment(name)
    config = deployed_config(ModelConfig.preset("step3"), deployment.weights)
    cache = shape_cache(deployment, roles_of(deployment)[0])
    assert cache is not None
    found = compile_deployment(config, deployment, cache)
    for role in roles_of(deployment):
        assert found.roles[role.name].weights == sum(weight_bytes(config, deployment.weights, role).values())
    assert found.peak_bytes < 2 * 2**30


def test_the_releases_claim_of_eight_cards_of_48_gb_holds_with_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", "8gpu-fp8-48gb", "--no-compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["text_only"]
    assert found["kv_tokens"] >= 800_000


def test_what_fits_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", "2a2f", "--no-compile"]) == 0
    text = capsys.readouterr().out
    assert "attention (16)" in text
    assert "6,144 sequences of 4,096 tokens" in text
    assert text.splitlines()[-1] == "fits"


def test_what_does_not_fit_is_exit_code_1_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mm-encoder-tp-mode", "data", "--no-compile", "--json"]
    assert main(["plan", "memory", "8gpu-fp8-48gb", *words]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["compilation"] is None
    assert any("mm_encoder_tp_mode weights" in remedy for remedy in found["remedies"])
    assert any("--text-only" in remedy for remedy in found["remedies"])


def test_options_replace_what_the_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kv-cache-dtype", "int4", "--hardware", "h200-sxm", "--sequences", "16", "--context-tokens", "65536"]
    assert main(["plan", "memory", "8gpu-fp8-48gb", "--no-compile", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_cache"] == "int4"
    assert found["memory"] == int(140.4 * 2**30)
    assert found["workload"] == {"sequences": 16, "context_tokens": 65536}
    assert found["roles"]["both"]["kv_cache"] == 2 * 65536 * 272 * 61


def test_guesses_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "memory", "2a2f", "--no-compile", "--json"]
    given = json.dumps({"method": "ngram", "num_speculative_tokens": 4})
    found = []
    for more in ([], ["--speculative-config", given]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    sizes = [one["roles"]["attention"]["workspace_estimate"] for one in found]
    assert [one["history"] for one in sizes] == [0, 4 * 6144 * 4096]
    assert sizes[1]["decode"] > 4 * sizes[0]["decode"]
    assert found[1]["kv_tokens"] <= found[0]["kv_tokens"]
    assert found[1]["step_tokens"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothere"], "no deployment nothere"),
        (["2a2f", "--model", "nothere"], "--model nothere"),
        (["local", "--sequences", "4"], "give both"),
        (["2a2f", "--speculative-config", '{"method": "eagle"}'], "allowed: ngram"),
        (["2a2f", "--sequences", "0"], "at least 1"),
        (["2a2f", "--model", "step3-tiny"], "does not divide the model"),
    ],
)
def test_mistakes_are_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", "--no-compile", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_sizes_of_the_test_model_are_all_different_enough() -> None:
    """Otherwise a weight in the wrong place could go unnoticed."""
    one = parse_deployment("one", {"afd": "off", "weights": "bfloat16"})
    config = dataclasses.replace(deployed_config(SMALL, "bfloat16"))
    sizes = weight_bytes(config, "bfloat16", roles_of(one)[0]).values()
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("sequences", ["1", "100"])
def test_a_context_beyond_the_models_positions_does_not_fit(sequences: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--no-compile", "--context-tokens", "131072", "--sequences", sequences]
    assert main(["plan", "memory", "2a2f", *options]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT: sequences of 131,072 tokens are longer than the model's 65,536 positions" in printed
    assert "would fit: --context-tokens 65536, the most that the model has" in printed
    assert main(["plan", "memory", "2a2f", "--json", *options]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_arithmetic_alone_imports_no_jax() -> None:
    words = ["plan", "memory", "2a2f", "--no-compile", "--json"]
    program = (
        "import sys; from step3_jax.cli.main import main; code = main(sys.argv[1:]); print(code, 'jax' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.splitlines()[-1] == "0 False"
