"""The tables: what divides a model, what goes where, what is refused and what is offered instead. No device is used."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from step3_jax.checkpoint.names import expected_tensors, is_fp8_tensor, our_path
from step3_jax.config import ModelConfig
from step3_jax.layout.parallel import Parallel, find_problems, fit_parallel
from step3_jax.layout.table import AXES, PARAMETERS, mesh_axes, shard_shape, view_shape
from step3_jax.sharding import parameter_spec, partition_spec

STEP3 = ModelConfig.preset("step3")
FP8_BLOCK = (128, 128)


def sizes(parallel: Parallel) -> dict[str, int]:
    return dict(zip(AXES, parallel.mesh_shape, strict=True))


@settings(max_examples=200)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 30))
def test_every_divisor_of_the_devices_is_a_number_of_expert_groups(dp: int, tp: int, pick: int) -> None:
    divisors = [ep for ep in range(1, dp * tp + 1) if dp * tp % ep == 0]
    parallel = Parallel(dp, tp, divisors[pick % len(divisors)])
    along = sizes(parallel)
    assert math.prod(along.values()) == dp * tp
    for logical, count in (("width", tp), ("experts", parallel.ep), ("rows", dp * tp)):
        assert math.prod(along[axis] for axis in mesh_axes(logical)) == count
    assert math.prod(along[axis] for axis in mesh_axes("rows", "tensor")) == dp


def test_an_axis_of_the_mesh_is_used_once_in_an_array() -> None:
    assert partition_spec(("experts", "expert_width", None)) == PartitionSpec(AXES[0::2], AXES[1::2], None)
    with pytest.raises(ValueError, match="would be sharded twice along tensor_expert"):
        partition_spec(("experts", "width"))
    with pytest.raises(ValueError, match="no logical axis 'depth'"):
        partition_spec(("depth",))


@pytest.mark.parametrize("attention", ["data", "tensor"])
def test_every_parameter_of_the_model_has_a_place(attention: str) -> None:
    used = set()
    for name, shape in expected_tensors(STEP3).items():
        path = our_path(name)
        spec = parameter_spec(path, attention)
        assert len(spec) in (0, len(view_shape(shape, path, len(spec), STEP3.vision))), name
        used |= {end for end in PARAMETERS if ".".join(map(str, path)).endswith(end)}
    assert used == set(PARAMETERS), "the table names parameters that the model does not have"
    assert parameter_spec(("vision", "layers", 3, "layer_norm1", "weight"), attention) == PartitionSpec()


def test_a_copied_tower_has_the_shapes_of_the_checkpoint() -> None:
    for name, shape in expected_tensors(STEP3).items():
        path = our_path(name)
        if path[0] != "text":
            assert parameter_spec(path, vision="data") == PartitionSpec()
            assert shard_shape(shape, path, Parallel(tp=8, ep=8, vision="data"), STEP3.vision) == shape


@pytest.mark.parametrize(("tp", "heads", "columns"), [(8, 2, 1920), (5, 4, 3072), (32, 1, 480)])
def test_the_tower_is_cut_between_heads_and_filled_up_where_they_do_not_divide(
    tp: int, heads: int, columns: int
) -> None:
    shapes = {our_path(name): shape for name, shape in expected_tensors(STEP3).items()}

    def shard(name: str) -> tuple[int, ...]:
        path = ("vision", "layers", 0, *name.split("."))
        return shard_shape(shapes[path], path, Parallel(tp=tp, ep=1), STEP3.vision)

    assert shard("self_attn.qkv_proj.weight") == (3, heads, 112, 1792)
    assert shard("self_attn.qkv_proj.bias") == (3, heads, 112)
    assert shard("self_attn.out_proj.weight") == (1792, 1, heads, 112)
    assert (shard("mlp.fc1.weight"), shard("mlp.fc2.weight")) == ((columns, 1792), (1792, columns))
    assert shard("mlp.fc2.bias") == (1792,)


@pytest.mark.parametrize(
    ("asked", "ep", "mesh_shape"),
    [
        (Parallel(tp=8), 8, (1, 1, 8, 1)),
        (Parallel(dp=8), 8, (8, 1, 1, 1)),
        # 32 does not divide 48 experts: 16 groups, and two devices divide the width of each.
        (Parallel(dp=4, tp=8), 16, (4, 1, 4, 2)),
        (Parallel(dp=16, tp=1), 16, (16, 1, 1, 1)),
    ],
)
def test_the_real_model_gets_as_many_groups_of_experts_as_divide_it(asked, ep, mesh_shape) -> None:
    found = fit_parallel(asked, STEP3.text, fp8_block=FP8_BLOCK)
    assert (found.ep, found.mesh_shape) == (ep, mesh_shape)


@pytest.mark.parametrize(
    ("asked", "block", "reason", "nearest"),
    [
        (Parallel(tp=3), None, "hidden_size is 7168, which tp = 3 does not cut", "dp 3, tp 1, ep 3 (3 devices)"),
        (Parallel(tp=8, ep=5), None, "ep = 5 is not a divisor of the dp x tp = 8", "dp 1, tp 8, ep 4 (8 devices)"),
        # In BF16 16 parts of 320 columns serve; FP8 scales are of 128.
        (
            Parallel(tp=16, ep=16),
            FP8_BLOCK,
            "share_expert_dim is 5120, which tp = 16 does not cut into equal parts of whole FP8 blocks of 128",
            "dp 2, tp 8, ep 16 (16 devices)",
        ),
        (
            Parallel(tp=1, dp=32, ep=32),
            None,
            "moe_num_experts is 48, which ep = 32 does not cut",
            "dp 32, tp 1, ep 16 (32 devices)",
        ),
    ],
)
def test_what_does_not_divide_the_model_is_refused_with_the_nearest_that_does(asked, block, reason, nearest) -> None:
    with pytest.raises(ValueError, match="does not divide the model") as caught:
        fit_parallel(asked, STEP3.text, fp8_block=block)
    assert reason in str(caught.value)
    assert f"The nearest that does: {nearest}" in str(caught.value)


def test_sixteen_tensor_parts_serve_where_scales_do_not_hinder() -> None:
    assert fit_parallel(Parallel(tp=16), STEP3.text).ep == 16


def test_heads_are_counted_only_where_they_are_shared_out() -> None:
    text = dataclasses.replace(STEP3.text, num_attention_heads=3, head_dim=256)
    assert find_problems(Parallel(tp=2, ep=2), text) == []
    assert "num_attention_heads is 3" in find_problems(Parallel(tp=2, ep=2, attention="tensor"), text)[0]


def test_a_model_without_experts_has_no_groups_of_them() -> None:
    text = dataclasses.replace(STEP3.text, moe_layers=())
    assert fit_parallel(Parallel(tp=4), text).ep == 1
    with pytest.raises(ValueError, match="the model has no experts"):
        fit_parallel(Parallel(tp=4, ep=2), text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision": "tensor"}, "vision is 'tensor'; allowed: weights, data"),
        ({"dp": 0}, "dp is 0; a whole number of at least 1"),
        ({"tp": True}, "tp is True"),
        ({"ep": 1.5}, "ep is 1.5"),
        ({"attention": "head"}, "attention is 'head'; allowed: data, tensor"),
        ({"exchange": "ring"}, "exchange is 'ring'; allowed: auto, gather, all_to_all"),
        ({"tp": 2, "attention": "tensor", "exchange": "all_to_all"}, "give exchange='gather' or attention='data'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(values, message) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Parallel(**values)
    assert message in str(caught.value)


def test_fp8_tensors_of_the_real_model_are_cut_between_blocks() -> None:
    """With every accepted setting, the scales of a part are those of its own values."""
    for asked in (Parallel(tp=8), Parallel(dp=4, tp=8), Parallel(dp=2, tp=4, ep=2)):
        along = sizes(fit_parallel(asked, STEP3.text, fp8_block=FP8_BLOCK))
        for name, shape in expected_tensors(STEP3).items():
            spec = parameter_spec(our_path(name))
            for size, entry in zip(shape[-2:], tuple(spec)[-2:], strict=False):
                parts = math.prod(along[axis] for axis in entry or ())
                assert not is_fp8_tensor(name) or parts == 1 or size % (parts * 128) == 0, name
