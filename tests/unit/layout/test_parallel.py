"""Settings of each role: what divides its part of the model, and what would."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.config import ModelConfig
from step3_jax.layout.parallel import (
    ATTENTION,
    BOTH,
    FFN,
    Parallel,
    find_problems,
    list_parallels,
    nearest_parallel,
)

STEP3 = ModelConfig.preset("step3").text


def test_every_way_to_divide_the_devices_is_listed_once() -> None:
    found = list_parallels(12)
    assert len(found) == len(set(found)) == 36
    assert all(one.num_devices == 12 and 12 % one.expert_groups == 0 for one in found)


@settings(max_examples=60)
@given(st.sampled_from(list_parallels(16) + list_parallels(24) + list_parallels(7)), st.booleans())
def test_what_divides_the_whole_model_divides_each_role(parallel: Parallel, is_fp8: bool) -> None:
    """And whatever a role cannot use, the whole model cannot either."""
    block = (128, 128) if is_fp8 else None
    both, attention, ffn = (find_problems(parallel, STEP3, block, role) for role in (BOTH, ATTENTION, FFN))
    assert sorted(both) == sorted(attention + ffn)


def test_the_ffn_side_cuts_neither_heads_nor_the_width_of_the_model() -> None:
    odd = dataclasses.replace(STEP3, hidden_size=7169, num_attention_heads=63)
    assert find_problems(Parallel(tp=8, ep=8), odd, (128, 128), FFN) == []
    assert len(find_problems(Parallel(tp=8, ep=8), odd, (128, 128), ATTENTION)) == 2


def test_experts_are_no_matter_of_the_attention_side() -> None:
    assert find_problems(Parallel(dp=5, ep=5), STEP3, None, ATTENTION) == []
    assert "moe_num_experts is 48" in find_problems(Parallel(dp=5, ep=5), STEP3, None, FFN)[0]


def test_the_nearest_setting_is_sought_for_the_role() -> None:
    odd = dataclasses.replace(STEP3, hidden_size=7 * 1024 + 1)
    wanted = Parallel(tp=8, ep=5)
    assert nearest_parallel(wanted, odd, role=FFN) == Parallel(tp=8, ep=4)
    assert nearest_parallel(wanted, odd).tp == 1


@pytest.mark.parametrize("ep", [None, 3])
def test_the_groups_of_experts_must_be_known(ep: int | None) -> None:
    with pytest.raises(ValueError, match=f"ep is {ep}; a divisor of dp x tp = 4 is needed"):
        _ = Parallel(dp=2, tp=2, ep=ep).expert_width_parts
