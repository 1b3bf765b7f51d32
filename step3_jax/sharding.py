"""The tables of `layout/table.py` as JAX shardings."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import PartitionSpec

from step3_jax.layout.parallel import AttentionForm, VisionForm
from step3_jax.layout.table import assign_axes, assign_parameter


def partition_spec(
    axes: Sequence[str | None], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> PartitionSpec:
    """The sharding of an array whose axes have these logical names; None for an axis that is not sharded.

    Raises:
      ValueError: If two axes would be sharded along the same mesh axis.
    """
    return PartitionSpec(*(entry or None for entry in assign_axes(axes, attention, vision)))


def parameter_spec(
    path: Sequence[str | int], attention: AttentionForm = "data", vision: VisionForm = "weights"
) -> PartitionSpec:
    """The sharding of the parameter at `path` of a `Step3`, in the shape of `layout.table.view_shape`.

    Its FP8 scales, if any, are sharded the same way.
    """
    return PartitionSpec(*(entry or None for entry in assign_parameter(path, attention, vision)))
