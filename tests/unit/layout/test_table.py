"""The sharding table as shapes: what one device has of each parameter."""

from __future__ import annotations

import math

import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.parallel import Parallel, list_parallels
from step3_jax.layout.table import assign_axes, parameter_axes, shard_shape
from step3_jax.layout.tensor import list_rows, symbol_sizes

STEP3 = ModelConfig.preset("step3")


@pytest.mark.parametrize("parallel", list_parallels(16), ids=str)
def test_the_devices_together_have_each_parameter_at_least_once(parallel: Parallel) -> None:
    symbols = symbol_sizes(STEP3)
    for row, _ in list_rows(STEP3):
        shape, path = row.sizes(symbols), row.ours.split(".")
        own = shard_shape(shape, path, parallel, STEP3.vision)
        assert len(own) in (len(shape), len(parameter_axes(path))), row
        assert math.prod(own) * parallel.num_devices >= math.prod(shape), row
        if not any(parameter_axes(path)):
            assert own == shape, row


def test_rows_that_do_not_divide_are_filled_up() -> None:
    path = "text.lm_head.weight".split(".")
    assert shard_shape((128_815, 7168), path, Parallel(tp=8, ep=8)) == (16_102, 7168)


def test_experts_and_their_width_are_cut_along_different_axes() -> None:
    path = "text.layers.4.ffn.moe.down_proj".split(".")
    assert shard_shape((48, 7168, 5120), path, Parallel(dp=4, tp=8, ep=16)) == (3, 7168, 2560)


def test_an_array_cannot_lie_twice_on_one_axis_of_the_mesh() -> None:
    with pytest.raises(ValueError, match="would be sharded twice along tensor_expert"):
        assign_axes(("experts", "width"))
