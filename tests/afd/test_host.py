"""Attention and FFN on disjoint devices of one process: the fused model's tokens, everything where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

Ask = Callable[..., dict]

# Topology, devices of an instance, shards of the FFN side (dp, tp, ep), micro-batches.
CASES = [
    {"afd": "1a1f", "microbatches": 1},
    {"afd": "2a2f", "microbatches": 3},
    # Slow: each compiles for its devices, and the counts of sides and micro-batches are in others too.
    pytest.param({"afd": "2a1f", "microbatches": 2}, marks=pytest.mark.slow),
    {"afd": "1a2f", "parallel": [1, 2, 1], "microbatches": 4},
    {"afd": "1a1f", "devices": 2, "parallel": [2, 1, 2], "microbatches": 3},
    pytest.param({"afd": "2a3f", "parallel": [1, 3, 3], "microbatches": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['afd']}-{case['microbatches']}")
def test_tokens_are_those_of_the_fused_model(host: Ask, case: dict[str, object]) -> None:
    found = host("tokens", **case)
    assert found["afd"] == found["fused"]
    assert [len(one[0]) for one in found["afd"]] == [4, 7, 10, 13, 16]


def test_one_prompt_is_padded_with_idle_rows(host: Ask) -> None:
    found = host("tokens", afd="2a2f", microbatches=3, count=1)
    assert found["afd"] == found["fused"]


@pytest.mark.parametrize(
    ("afd", "microbatches"),
    [
        ("2a2f", 3),
        # Each has programs of its own, which take seconds to compile; 1A1F is tested over two processes too.
        *[pytest.param("1a1f", count, marks=pytest.mark.slow) for count in (1, 2, 3)],
        *[pytest.param("2a2f", count, marks=pytest.mark.slow) for count in (1, 2)],
    ],
)
def test_guesses_change_nothing_of_the_tokens(host: Ask, afd: str, microbatches: int) -> None:
    found = host("guesses", afd=afd, microbatches=microbatches)
    assert found["afd"] == found["fused"]
    assert 0 < found["accepted"] < found["drafted"]


def test_masks_reach_the_rows_of_their_sequences(host: Ask) -> None:
    found = host("masks", afd="2a2f", microbatches=3)
    assert found["afd"] == found["fused"]
    assert [len(ids) for ids in found["fused"]] == [31, 34, 40]


@pytest.mark.slow
def test_masked_sequences_have_no_guesses_and_those_beside_them_do(host: Ask) -> None:
    found = host("masks", afd="2a2f", microbatches=3, guesses=True)
    assert found["afd"] == found["fused"]


def test_sampling_penalties_and_chunks_are_those_of_the_fused_model(host: Ask) -> None:
    found = host("features", afd="2a2f", microbatches=3)
    assert found["afd"] == found["fused"]
    assert found["afd_logprobs"] == pytest.approx(found["fused_logprobs"], abs=1e-3)


def test_nothing_is_compiled_after_warm_up(host: Ask) -> None:
    found = host("repeat", afd="2a2f", microbatches=3)
    assert found["before"] == found["after"]
    # Dense and mixture layers of each size that a call starts with: nothing per layer.
    sizes = found["before"]["begin_chunk"] + found["before"]["begin"]
    assert found["before"]["attention"] <= 2 * sizes
    assert found["before"]["ffn"] <= 2 * sizes


@pytest.mark.parametrize("case", [{"afd": "2a2f"}, {"afd": "1a2f", "parallel": [1, 2, 1], "microbatches": 4}])
def test_weights_and_cache_are_only_where_their_role_needs_them(host: Ask, case: dict[str, object]) -> None:
    found = host("places", **case)
    assert not set(found["attention"]) & set(found["ffn"])
    assert found["weights"] == {"attention": found["attention"], "ffn": found["ffn"]}
    assert found["cache"] == found["attention"]
    # The pool has the pages of all three layers.
    assert found["pages_each"] == 3 * 38 // len(found["attention"])
    assert found["gate_proj"] == [6, 24, 48]
    assert found["gate_proj_each"] == ([6, 12, 48] if "parallel" in case else [3, 24, 48])


def test_prompts_that_share_their_start_get_the_same_from_cached_pages(host: Ask) -> None:
    found = host("prefix", afd="2a2f")
    assert found["warm"] == found["cold"]
    assert (found["warm_cached"], found["cold_cached"]) == ([0, 128, 128, 128], [0] * 4)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ({"afd": "2a1f"}, 1),
        ({"afd": "1a1f", "devices": 2}, 2),
        ({"afd": "1a1f", "devices": 2, "vision": "data"}, 1),
    ],
)
def test_the_devices_of_an_attention_instance_encode_an_image_together(
    host: Ask, case: dict[str, object], parts: int
) -> None:
    found = host("images", **case)
    assert found["shape"] == [3, 1, 48]
    assert found["error"] < 1e-5 * found["largest"] + 1e-6
    assert (found["parts"], found["devices"]) == (parts, [0, 1])


def test_a_checkpoint_is_loaded_straight_to_its_roles_devices(host: Ask) -> None:
    found = host("loaded", afd="2a2f")
    assert found == {"attention": [0, 1], "ends": [0, 1], "ffn": [2, 3], "dtype": "float32"}


@pytest.mark.parametrize(
    ("rows", "storage"), [(1, "float32"), (4, "float32"), (4, "fp8"), (1, "bfloat16"), (None, "float32")]
)
def test_no_copy_of_the_cache_is_in_the_compiled_steps(host: Ask, rows: int | None, storage: str) -> None:
    # Without rows: a chunk of prompts.
    found = host("hlo", afd="2a2f", rows=rows, storage=storage)
    # Two layers, keys and values, and their scales.
    assert found["writes"] == 4 * (2 if storage == "fp8" else 1)
    assert set(found["done"]) <= {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "fusion"}


def test_a_stage_that_hangs_is_named(host: Ask) -> None:
    found = host("deadline", afd="2a2f", microbatches=3)
    assert "the FFN step of layer 1, micro-batch 1" in found["message"]
    assert "within 0.5 s" in found["message"]
    assert found["elapsed_s"] < 3
    assert found["works_again"]


# A different payload means a different set of programs.
@pytest.mark.parametrize("payload", ["float32", pytest.param("fp8", marks=pytest.mark.slow)])
def test_sides_of_different_platforms_copy_explicitly_and_choose_their_own_kernels(host: Ask, payload: str) -> None:
    found = host("mixed", afd="1a1f", payload=payload)
    there, back = sorted(found["copies"], key=lambda copy: copy["from"])
    assert there == {"from": 0, "to": 1, "dtype": "uint8", "columns": found["row_bytes"]}
    assert back == {"from": 1, "to": 0, "dtype": "uint8", "columns": found["output_bytes"]}
    # 48 values and one scale, or 48 of float32; two ids of 16 bits and two weights.
    assert found["row_bytes"] == (48 + 4 if payload == "fp8" else 4 * 48) + 2 * (2 + 4)
    if payload == "float32":
        assert found["afd"] == found["fused"]


# The payloads themselves are compared on small models; this is what they cost in answers.
@pytest.mark.slow
def test_the_shipped_model_answers_alike_with_any_payload(host: Ask) -> None:
    found = host("quality", afd="2a1f")
    fused = found["fused"]
    assert "6267" in fused[-1]["text"]
    assert [one["tokens"] for one in found["float32"]] == [one["tokens"] for one in fused]
    differences, num_equal = [], 0
    for exact, rounded in zip(fused, found["fp8"], strict=True):
        for number, (left, right) in enumerate(zip(exact["tokens"], rounded["tokens"], strict=False)):
            differences.append(abs(exact["logprobs"][number] - rounded["logprobs"][number]))
            if left != right:
                break
            num_equal += 1
    assert num_equal >= 0.8 * sum(len(one["tokens"]) for one in fused)
    assert sum(differences) / len(differences) < 0.02


def test_who_did_what_when_is_recorded(host: Ask) -> None:
    found = host("trace", afd="2a2f", microbatches=3)
    rows = [row for row in found["chrome"]["traceEvents"] if row["ph"] == "X"]
    decode = [row["args"] for row in rows if row["cat"] == "decode"]
    steps = {args["step"] for args in decode}
    # Five prompts on two devices: four slots each, in two micro-batches of two rows, later fewer.
    for step in steps:
        own = [(args["lane"], args["layer"], args["microbatch"]) for args in decode if args["step"] == step]
        count = 1 + max(number for _, _, number in own)
        assert len(own) == len(set(own)) == count * (4 * 3 + 1)
    assert max(args["microbatch"] for args in decode) >= 1
    for row in rows:
        assert row["dur"] >= 0
    assert 0 < found["efficiency"] <= 1.01


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"afd": "4a4f"}, "needs 8 devices, and there are 6.*2a4f|3a3f"),
        ({"afd": "1a4f", "parallel": [4, 1, 4]}, "moe_num_experts is 6.*give tp 1 ep 1 or .*tp 4 ep 2"),
        ({"afd": "1a2f", "parallel": [1, 3, 1]}, "dp x tp must be 2"),
        ({"afd": "1a1f", "microbatches": 5}, "allowed: 1 to 4"),
        ({"afd": "1a1f", "payload": "fp4"}, "allowed: auto, fp8"),
    ],
)
def test_what_cannot_be_is_refused(host: Ask, case: dict[str, object], message: str) -> None:
    found = host("tokens", **case)
    assert found["error_type"] == "ValueError"
    assert re.search(message, found["error"]), found["error"]
