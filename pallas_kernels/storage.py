"""Bytes of stored rows: pages of the KV cache, and FP8 rows with their scales. Arithmetic without jax, so that the planner
need not import it; `pages.py` has the table of the formats.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

# Tokens of a page, and columns that share a scale in int4.
PAGE_SIZE = 64
INT4_GROUP = 64
# Columns of a row of activations that share a scale in FP8.
BLOCK = 128

Storage = Literal["float32", "bfloat16", "fp8", "int4"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
# Bytes of a stored column, and of a scale. An int4 column is a byte of two values.
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1, "int4": 1}
_SCALE_BYTES = {"float32": 0, "bfloat16": 0, "fp8": 4, "int4": 2}


class RowLayout(NamedTuple):
    """Keys or values of one token in one layer, in stored form.

    Attributes:
      columns: Stored columns.
      num_scales: Scales; 0 if rows are stored unscaled.
      num_bytes: Bytes of both.
    """

    columns: int
    num_scales: int
    num_bytes: int


def row_layout(head_dim: int, storage: Storage) -> RowLayout:
    """The layout of a row.

    Args:
      head_dim: K.
      storage: A format of the pages.

    Raises:
      ValueError: For an unknown storage, or a head size that int4 cannot divide into groups.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; allowed: {', '.join(STORAGES)}")
    if storage == "int4" and head_dim % INT4_GROUP:
        raise ValueError(f"int4 needs a head size that is a multiple of {INT4_GROUP}; it is {head_dim}")
    columns = head_dim // 2 if storage == "int4" else head_dim
    num_scales = {"fp8": 1, "int4": head_dim // INT4_GROUP}.get(storage, 0)
    return RowLayout(columns, num_scales, columns * _VALUE_BYTES[storage] + num_scales * _SCALE_BYTES[storage])


def bytes_per_token(head_dim: int, storage: Storage) -> int:
    """Bytes of one token in one layer, keys and values with their scales.

    Raises:
      ValueError: As `row_layout`.
    """
    return 2 * row_layout(head_dim, storage).num_bytes
