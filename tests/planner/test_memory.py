"""Whether deployments fit, compared with what was published."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.storage import PAGE_SIZE
from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import Workload, load_deployment
from step3_jax.layout.parallel import Parallel
from step3_jax.planner.memory import MemoryPlan, plan_memory
from step3_jax.planner.memory_table import to_dict, to_lines

STEP3 = ModelConfig.preset("step3")


def plan(name: str, memory_gib: float | None = None, text_only: bool = False, **options: object) -> MemoryPlan:
    changes = {key: options.pop(key) for key in ("kv_cache", "workload", "weights", "parallel") if key in options}
    deployment = dataclasses.replace(load_deployment(name), **changes)
    memory_gib = deployment.device_memory_gib if memory_gib is None else memory_gib
    return plan_memory(STEP3, deployment, memory_gib=memory_gib, text_only=text_only, **options)


def test_2a2f_holds_the_published_batch() -> None:
    found = plan("2a2f", 79.6)
    assert not found.problems
    assert found.kv_tokens is not None
    assert found.kv_tokens >= 6144 * 4096
    attention, ffn = found.roles
    assert attention.kv_needed == 384 * 4096 * 31_720
    assert "routed experts" not in attention.parts
    assert ffn.kv_needed == 0
    assert set(ffn.parts) == {"dense layers", "shared experts", "routed experts"}


def test_2a2f_does_not_hold_it_with_a_bfloat16_cache() -> None:
    found = plan("2a2f", 79.6, kv_cache="bfloat16")
    assert len(found.problems) == 1
    assert "6,144 sequences of 4,096 tokens" in found.problems[0]
    assert any("kv_cache fp8" in remedy for remedy in found.remedies)


def test_eight_cards_of_48_gb_hold_the_decoder_and_800_000_tokens() -> None:
    found = plan("8gpu-fp8-48gb", text_only=True)
    assert not found.problems
    assert found.kv_tokens is not None
    assert found.kv_tokens >= 800_000


def test_eight_cards_of_48_gb_hold_800_000_tokens_beside_the_vision_tower() -> None:
    found = plan("8gpu-fp8-48gb")
    assert not found.problems
    assert found.kv_tokens is not None
    assert found.kv_tokens >= 800_000
    # One of eight shards of all but norms, embeddings and the first convolution.
    assert found.roles[0].parts["vision tower and projector"] < 9_350_749_184 / 8 * 1.06


def test_eight_cards_of_48_gb_do_not_hold_a_vision_tower_each() -> None:
    found = plan("8gpu-fp8-48gb", parallel=Parallel(tp=8, ep=8, vision="data"))
    assert "more than a device may use" in found.problems[0]
    assert found.kv_tokens == 0
    assert any("mm_encoder_tp_mode weights" in remedy for remedy in found.remedies)
    assert any("--text-only" in remedy for remedy in found.remedies)


def test_the_vision_tower_is_sharded_inside_an_attention_instance() -> None:
    sharded, copied = (plan("2a2f", 79.6, parallel=Parallel(2, 8, 2, vision=vision)) for vision in ("weights", "data"))
    parts = [one.roles[0].parts["vision tower and projector"] for one in (sharded, copied)]
    assert 7.5 < parts[1] / parts[0] < 8
    assert sharded.kv_tokens > copied.kv_tokens
    assert sharded.roles[0].workspace.image < copied.roles[0].workspace.image


def test_what_is_copied_too_often_is_told_to_be_shared_out() -> None:
    parallel = dataclasses.replace(load_deployment("8gpu-fp8-48gb").parallel, dp=8, tp=1)
    found = plan("8gpu-fp8-48gb", text_only=True, parallel=parallel)
    assert found.problems
    assert any("parallel.tp 8, dp 1" in remedy for remedy in found.remedies)


def test_more_memory_holds_more_tokens_in_whole_pages() -> None:
    tokens = [plan("8gpu-fp8-48gb", memory_gib, text_only=True).kv_tokens for memory_gib in (46, 48, 80)]
    assert None not in tokens
    assert tokens == sorted(set(tokens))
    assert all(number % (8 * PAGE_SIZE) == 0 for number in tokens)


def test_larger_chunks_of_prompts_leave_less_for_the_cache() -> None:
    small, large = (plan("8gpu-fp8-48gb", text_only=True, chunk_tokens=tokens) for tokens in (256, 4096))
    assert small.roles[0].workspace.total < large.roles[0].workspace.total
    assert small.kv_tokens > large.kv_tokens


def test_without_a_memory_nothing_is_refused() -> None:
    found = plan("local")
    assert found.memory_bytes is None
    assert found.kv_tokens is None
    assert not found.problems
    assert to_dict(found)["fits"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_share": 0.0}, "above 0 and at most 1"),
        ({"memory_gib": -1}, "above 0 is needed"),
        ({"chunk_tokens": 0}, "at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("2a2f", **options)


@pytest.mark.parametrize("name", sorted(file.stem for file in resources.find("configs/afd").glob("*.yaml")))
def test_every_shipped_deployment_can_be_planned_and_shown(name: str) -> None:
    found = plan(name)
    text = "\n".join(to_lines(found))
    for one in found.roles:
        assert f"{one.role.name} ({one.role.num_devices})" in text
    assert "workspace (estimate)" in text
    assert ("DOES NOT FIT" in text) == bool(found.problems)


def test_the_columns_of_the_report_add_up() -> None:
    found = plan("2a2f")
    cells = {line[:28].strip(): line[28:].split() for line in to_lines(found) if not line.startswith(" ")}
    for column in range(2):
        weights, cache, kept_free, budget, left = (
            0.0 if cells[name][column] == "-" else float(cells[name][column])
            for name in (
                "weights (arithmetic)",
                "KV cache (arithmetic)",
                "kept free for calls",
                "may be used",
                "left over",
            )
        )
        assert budget - weights - cache - kept_free == pytest.approx(left, abs=0.03)


def test_each_role_has_the_memory_of_its_own_devices() -> None:
    deployment = dataclasses.replace(load_deployment("2a2f"), ffn_hardware="l4")
    same = plan_memory(STEP3, deployment, memory_gib=79.6)
    small = plan_memory(STEP3, deployment, memory_gib=79.6, ffn_memory_gib=16)
    assert not same.problems
    assert [one.budget for one in small.roles] == [int(int(gib * 2**30) * small.memory_share) for gib in (79.6, 16)]
    assert len(small.problems) == 1
    assert "a device of the ffn side" in small.problems[0]
    assert "79.60 and 16.00 GiB" in "\n".join(to_lines(small))
    assert to_dict(small)["ffn_memory"] == 16 * 2**30
    assert not plan_memory(STEP3, deployment, memory_gib=79.6, ffn_memory_gib=16, has_remedies=False).remedies


@pytest.mark.parametrize("name", ["2a2f", "8gpu-fp8-48gb"])
def test_guesses_need_the_rows_of_their_tokens_and_the_tokens_that_they_are_looked_up_in(name: str) -> None:
    load = Workload(512, 4096)
    one, five = (plan(name, 79.6, workload=load, step_tokens=tokens) for tokens in (1, 5))
    for plain, guessing in zip(one.roles, five.roles, strict=True):
        before, after = plain.workspace, guessing.workspace
        assert before.history == 0
        shape = guessing.cache
        if shape is None:
            assert after.history == 0
        else:
            # Four bytes for each token of the sequences of all devices.
            assert after.history == 4 * 512 * 4096
            assert shape.rows * guessing.role.num_devices == 512
        assert (after.prefill, after.image) == (before.prefill, before.image)
        own = 0 if shape is None else 4 * 4 * shape.rows * 4096
        # The padding of experts' tiles does not grow.
        assert 1.5 * before.decode < after.decode - own <= 5 * before.decode
        assert after.total == after.history + max(after.decode, after.prefill, after.image)
    assert not any("token history" in line for line in to_lines(one))
    (line,) = (line for line in to_lines(five) if "token history (arithmetic)" in line)
    assert "0.01" in line
