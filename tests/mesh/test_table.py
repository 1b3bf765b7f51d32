"""Every way to spread a model gives one device's answer: tokens, log-probabilities, image features."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from tests.process import Ask

# Prompts of one bucket, so that a case compiles two programs.
LENGTHS, COUNTS = [5, 20, 1, 13, 30, 17, 9, 24], [8] * 8

SETTINGS = {
    "one device": {},
    "all tensor": {"tp": 8},
    "all data": {"dp": 8},
    "experts cut in width alone": {"dp": 2, "tp": 2, "ep": 1},
    "both, width along tensor and data": {"dp": 4, "tp": 2, "ep": 2},
    "no power of two, no common factor": {"dp": 3, "tp": 2, "ep": 2},
    "all-to-all": {"dp": 4, "tp": 2, "ep": 4, "exchange": "all_to_all"},
    "tensor parallel attention": {"dp": 2, "tp": 4, "ep": 4, "attention": "tensor"},
    "tensor parallel attention of one group": {"dp": 1, "tp": 4, "ep": 2, "attention": "tensor"},
}


@pytest.fixture(scope="module")
def alone(eight: Ask) -> dict[str, object]:
    return eight("generate", parallel=None, lengths=LENGTHS, counts=COUNTS)


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found["tokens"] == expected["tokens"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert found["free_pages"] == found["pages"], "pages are left behind"


# Each compiles for eight devices; what these cut is cut in others too.
SLOW = ("all data", "experts cut in width alone", "both, width along tensor and data")
THOROUGH = ("all tensor", "tensor parallel attention of one group")


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.thorough] * (name in THOROUGH)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in SETTINGS])
def test_every_setting_gives_the_answer_of_one_device(eight: Ask, alone: dict[str, object], name: str) -> None:
    setting = SETTINGS[name]
    found = eight("generate", parallel=setting or {"dp": 1}, lengths=LENGTHS, counts=COUNTS)
    assert_same(found, alone)
    is_tensor = setting.get("attention") == "tensor"
    assert found["shards"] == setting.get("dp", 1) * (1 if is_tensor else setting.get("tp", 1))
    # Copies of the cache are what tensor parallel attention costs, and it says so.
    tokens = found["pages"] * 64
    said = [f"the same memory holds {tokens} tokens instead of {4 * tokens}"] if is_tensor else []
    assert len(found["warnings"]) == len(said)
    assert all(part in message for part, message in zip(said, found["warnings"], strict=True))


def test_rows_that_come_and_go_wait_for_a_place_and_read_in_chunks(eight: Ask) -> None:
    """More sequences than slots, of different lengths, sampled: devices never wait for each other in vain."""
    lengths = [3, 90, 40, 1, 64, 10, 77, 30, 5, 21, 55, 2]
    counts = [4, 9, 1, 12, 6, 3, 8, 2, 15, 5, 7, 1]
    seeds = list(range(len(lengths)))
    request = {"lengths": lengths, "counts": counts, "seeds": seeds, "chunk": 128}
    found = eight("generate", parallel={"dp": 2, "tp": 2, "ep": 4}, batch=4, **request)
    assert_same(found, eight("generate", parallel=None, batch=4, **request))


@pytest.mark.slow
def test_guesses_are_verified_by_all_devices_in_the_same_steps(eight: Ask) -> None:
    """Their rows guess different numbers of tokens, or none; a step is equally wide everywhere. Two more programs."""
    request = {"lengths": [3, 40, 20, 30, 5], "counts": [40, 9, 30, 24, 40], "batch": 4}
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    found = eight("generate", parallel={"dp": 2, "tp": 2, "ep": 4}, speculation=speculation, **request)
    assert found["accepted"] > 0
    assert_same(found, eight("generate", parallel=None, **request))


def test_masks_reach_the_rows_of_their_sequences(eight: Ask) -> None:
    found = eight("masks", parallel={"dp": 2, "tp": 2, "ep": 4})
    assert found["spread"] == found["alone"]
    assert [len(ids) for ids in found["alone"]] == [31, 34, 40]


def test_prompts_that_share_their_start_get_the_same_from_cached_pages(eight: Ask) -> None:
    found = eight("prefix", parallel={"dp": 2, "tp": 2, "ep": 4})
    one = eight("prefix", parallel=None)
    assert found["warm"] == found["cold"] == one["warm"] == one["cold"]
    # The shard that holds the start is found too.
    assert found["warm_cached"] == one["warm_cached"] == [0, 128, 128, 128]
    assert found["cold_cached"] == [0] * 4
    assert found["warm_free"]
    assert found["cold_free"]


def test_fp8_weights_are_cut_with_their_scales(eight: Ask) -> None:
    request = {"kind": "fp8", "lengths": [9, 4], "counts": [4, 4]}
    expected = eight("generate", parallel=None, **request)
    assert_same(eight("generate", parallel={"dp": 1, "tp": 2, "ep": 1}, **request), expected)


@pytest.mark.parametrize(
    ("setting", "images"),
    [
        ({"tp": 2}, 1),
        ({"tp": 4}, 2),
        # Neither the tower's four heads nor the projector's 16 channels are divided by three, and five images not by two.
        ({"dp": 2, "tp": 3}, 5),
        ({"tp": 8}, 1),
        ({"tp": 2, "attention": "tensor"}, 1),
        ({"tp": 8, "vision": "data"}, 5),
    ],
)
def test_image_features_are_those_of_one_device(eight: Ask, setting: dict[str, object], images: int) -> None:
    found = eight("encode", parallel=setting, images=images)
    assert found["shape"][0] == images
    assert found["error"] < 1e-5 * found["largest"] + 1e-6


@pytest.mark.parametrize("setting", [{"dp": 2, "tp": 4}, {"tp": 3}])
def test_a_sharded_model_is_saved_and_loaded_part_by_part(
    eight: Ask, setting: dict[str, object], tmp_path: pathlib.Path
) -> None:
    found = eight("reload", parallel=setting, folder=str(tmp_path))
    assert found["is_same_file"], "what a model is filled up with is saved, or an order is lost"
    assert found["different"] == []
    assert found["different_stacked"] == []


@pytest.mark.slow
def test_stacked_layers_give_the_tokens_of_separate_ones(eight: Ask) -> None:
    """Slow: two more models are compiled."""
    request = {"lengths": [9, 4], "counts": [4, 4], "parallel": {"dp": 2, "tp": 2}}
    assert_same(eight("generate", stacked=True, **request), eight("generate", **request))


@pytest.mark.parametrize(
    ("setting", "tokens", "skew", "room"),
    [
        # Nearly all tokens may want any one of four groups, so there is room for all.
        ({"dp": 4, "tp": 2, "ep": 4}, 16, False, 32),
        ({"dp": 3, "tp": 2, "ep": 6}, 64, False, 56),
        # All want the same group: this step takes the fallback.
        ({"dp": 3, "tp": 2, "ep": 6}, 64, True, 56),
    ],
)
def test_all_to_all_drops_no_token(eight: Ask, setting: dict[str, int], tokens: int, skew: bool, room: int) -> None:
    found = eight("exchange", parallel=setting | {"exchange": "all_to_all"}, tokens=tokens, skew=skew)
    assert found["error"] < 1e-5
    assert found["room"] == room
    assert found["has_choice"] == (room == 56)


def test_nothing_is_compiled_after_warm_up_and_nothing_twice(eight: Ask) -> None:
    found = eight("traces", parallel={"tp": 4, "dp": 2, "ep": 2})
    assert found["warm_up"] == {"prefill": 2, "decode": 1, "copy_pages": 1}
    assert not found["work"]


def test_weights_and_cache_lie_where_the_table_says(eight: Ask) -> None:
    found = eight("describe", parallel={"dp": 4, "tp": 2, "ep": 4})
    whole = {name: size for name, (size, _) in found["weights"].items()}
    parts = {name: size // part for name, (size, part) in found["weights"].items()}
    dense, experts = "text.layers.0.ffn.mlp.gate_proj.weight", "text.layers.1.ffn.moe.gate_proj"
    assert (parts[dense], parts["text.layers.1.attention.self_attn.o_proj.weight"]) == (2, 2)
    assert parts["text.layers.1.attention.self_attn.wq.weight"] == 1
    # Four groups of experts, each expert's width on two devices.
    assert parts[experts] == 8
    # 131 rows are not divisible by two: one of zeros is added.
    assert (parts["text.lm_head.weight"], whole["text.lm_head.weight"]) == (2, 132 * 48)
    vision = {name for name, part in parts.items() if name.startswith(("vision", "projector")) and part == 2}
    layer = {"self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias", "self_attn.out_proj.weight"}
    layer |= {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"}
    projector = {"vit_downsampler2.weight", "vit_downsampler2.bias", "vit_large_projector.weight"}
    assert vision == {f"vision.layers.0.{name}" for name in layer} | {f"projector.{name}" for name in projector}
    assert (found["pages_each"], found["cache_parts"]) == (found["pages"] // 8, 8)
    assert found["is_original_whole"], "placing a model changes it"


def test_with_tensor_parallel_attention_a_group_has_one_cache(eight: Ask) -> None:
    found = eight("describe", parallel={"dp": 2, "tp": 4, "ep": 4, "attention": "tensor"})
    assert (found["pages_each"], found["cache_parts"]) == (found["pages"] // 2, 2)
    size, part = found["weights"]["text.layers.1.attention.self_attn.wq.weight"]
    assert size // part == 4


def test_more_devices_than_there_are_is_refused_with_what_to_do(eight: Ask) -> None:
    answer = eight("layout_error", parallel={"dp": 2, "tp": 8, "ep": 4})
    assert answer["error_type"] == "ValueError"
    assert "needs 16 devices, and there are 8 (cpu): " in answer["message"]
    assert "set STEP3_CPU_DEVICES=16 before the program starts" in answer["message"]
