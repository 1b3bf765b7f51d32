"""The estimate of what calls need: what it grows with, and the largest phase."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.grouped_matmul import mosaic
from step3_jax.config import ModelConfig
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN, Parallel
from step3_jax.layout.role import Role, deployed_config
from step3_jax.layout.workspace import TILE_ROWS, Workspace, estimate_workspace

STEP3 = deployed_config(ModelConfig.preset("step3"), "fp8")
EIGHT = Role(BOTH, 8, Parallel(tp=8, ep=8))


def test_the_largest_phase_counts() -> None:
    workspace = Workspace(decode=1, prefill=3, image=2)
    assert (workspace.total, workspace.phase) == (3, "prefill")


def test_an_experts_last_tile_is_as_large_as_the_kernels_largest() -> None:
    assert max(mosaic.TILE_ROWS) == TILE_ROWS


@pytest.mark.parametrize("name", ["rows", "chunk_tokens"])
def test_more_tokens_at_once_need_more(name: str) -> None:
    phase = "decode" if name == "rows" else "prefill"
    given = {"rows": 16, "chunk_tokens": 256}
    small = estimate_workspace(STEP3, "fp8", EIGHT, **given)
    large = estimate_workspace(STEP3, "fp8", EIGHT, **(given | {name: 2 * given[name]}))
    assert getattr(large, phase) > getattr(small, phase)
    assert dataclasses.replace(large, **{phase: getattr(small, phase)}) == small


def test_images_need_an_eighth_where_the_tower_is_sharded_and_nothing_without_a_tower_or_apart_from_it() -> None:
    copied = Role(BOTH, 8, dataclasses.replace(EIGHT.parallel, vision="data"))
    whole, shard = (estimate_workspace(STEP3, "fp8", role, rows=1).image for role in (copied, EIGHT))
    assert whole > 2**30
    # The residual stream is not sharded.
    assert whole / 8 < shard < whole / 6
    assert estimate_workspace(dataclasses.replace(STEP3, vision=None), "fp8", EIGHT, rows=1).image == 0
    assert estimate_workspace(STEP3, "fp8", Role(FFN, 8, EIGHT.parallel), rows=1).image == 0


def test_each_micro_batch_in_flight_takes_a_row_each_way_for_a_token() -> None:
    role = Role(ATTENTION, 16, Parallel(dp=16, ep=1))
    one, three = (estimate_workspace(STEP3, "fp8", role, rows=128, num_microbatches=count) for count in (1, 3))
    assert three.decode - one.decode == 2 * 128 * 7168 * 2 * 2


def test_an_ffn_device_receives_the_tokens_of_all_attention_devices() -> None:
    role = Role(FFN, 8, EIGHT.parallel)
    few, many = (estimate_workspace(STEP3, "fp8", role, rows=128, num_sources=count) for count in (8, 16))
    assert many.decode > 1.5 * few.decode
