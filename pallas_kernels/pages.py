"""Pages of a KV cache with one key/value head: 64 tokens a page, in four storage formats.

| storage | values | scales | bytes a token and layer, K = 256 |
| --- | --- | --- | --- |
| float32 | float32 | - | 2,048 |
| bfloat16 | bfloat16 | - | 1,024 |
| fp8 | float8_e4m3fn | one float32 a token: max|row| / 448 | 520 |
| int4 | two of -7..7 in a byte | one bfloat16 for 64 columns of a token: max|group| / 7 | 272 |

In int4 the low half of byte j holds column j, the high half column j + K/2, each plus 8. A row of zeros has scale 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

PAGE_SIZE = 64
INT4_GROUP = 64
FP8_MAX = 448.0
INT4_MAX = 7.0

Storage = Literal["float32", "bfloat16", "fp8", "int4"]
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8}


class KVPages(NamedTuple):
    """One layer's pages. C = K, or K/2 in int4; G = scales of a row: 1 in fp8, K/64 in int4.

    Attributes:
      keys, values: Stored rows, [P, page, C].
      key_scales, value_scales: [P, G, page]; None where rows are stored unscaled.
    """

    keys: Num[Array, "P page C"]
    values: Num[Array, "P page C"]
    key_scales: Float[Array, "P G page"] | None = None
    value_scales: Float[Array, "P G page"] | None = None

    @property
    def storage(self) -> Storage:
        """The format, read off the dtype."""
        for name in get_args(Storage):
            if self.keys.dtype == _DTYPES[name]:
                return name
        raise ValueError(f"pages of {self.keys.dtype} are in no known format: {', '.join(get_args(Storage))}")

    @property
    def page_size(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2] * (2 if self.storage == "int4" else 1)


def empty_pages(num_pages: int, head_dim: int, storage: Storage, *, page_size: int = PAGE_SIZE) -> KVPages:
    """Pages of zeros.

    Raises:
      ValueError: For a storage that does not exist, or a head size that int4 cannot cut in groups.
    """
    columns, groups, scale_dtype = _row_layout(head_dim, storage)
    rows = jnp.zeros((num_pages, page_size, columns), _DTYPES[storage])
    scales = None if scale_dtype is None else jnp.ones((num_pages, groups, page_size), scale_dtype)
    return KVPages(rows, rows, scales, scales)


def bytes_per_token(head_dim: int, storage: Storage) -> int:
    """Bytes that one token takes in one layer, keys and values with their scales."""
    columns, groups, scale_dtype = _row_layout(head_dim, storage)
    scale_bytes = 0 if scale_dtype is None else groups * jnp.dtype(scale_dtype).itemsize
    return 2 * (columns * jnp.dtype(_DTYPES[storage]).itemsize + scale_bytes)


def encode_rows(rows: Float[Array, "*lead K"], storage: Storage) -> tuple[Array, Array | None]:
    """Rows as they are stored, [*lead, C], and their scales, [*lead, G], if the format has them."""
    _, groups, scale_dtype = _row_layout(rows.shape[-1], storage)
    if scale_dtype is None:
        return rows.astype(_DTYPES[storage]), None
    grouped = rows.astype(jnp.float32).reshape(*rows.shape[:-1], groups, -1)
    largest = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
    scales = jnp.where(largest > 0, largest / (FP8_MAX if storage == "fp8" else INT4_MAX), 1.0).astype(scale_dtype)
    scaled = (grouped / scales.astype(jnp.float32)).reshape(rows.shape)
    if storage == "fp8":
        stored = jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    else:
        codes = (jnp.clip(jnp.round(scaled), -INT4_MAX, INT4_MAX) + 8).astype(jnp.uint8)
        low, high = jnp.split(codes, 2, axis=-1)
        stored = low | (high << 4)
    return stored, scales[..., 0]


def decode_rows(
    stored: Num[Array, "*lead C"], scales: Float[Array, "*lead G"] | None, dtype: jnp.dtype
) -> Float[Array, "*lead K"]:
    """The inverse of `encode_rows` up to rounding: value * scale in float32, then cast to `dtype`."""
    if scales is None:
        return stored.astype(dtype)
    if stored.dtype == jnp.uint8:
        codes = jnp.concatenate([stored & 15, stored >> 4], axis=-1)
        values = codes.astype(jnp.float32) - 8
    else:
        values = stored.astype(jnp.float32)
    grouped = values.reshape(*values.shape[:-1], scales.shape[-1], -1) * scales.astype(jnp.float32)[..., None]
    return grouped.reshape(values.shape).astype(dtype)


def write_rows(
    pages: KVPages,
    keys: Float[Array, "N K"],
    values: Float[Array, "N K"],
    page_ids: Int[Array, " N"],
    slots: Int[Array, " N"],
) -> KVPages:
    """Writes N tokens, each to a slot of a page; a page id outside [0, P) drops its token."""
    new = []
    for rows, buffer, scale_buffer in (
        (keys, pages.keys, pages.key_scales),
        (values, pages.values, pages.value_scales),
    ):
        stored, scales = encode_rows(rows, pages.storage)
        new.append(buffer.at[page_ids, slots].set(stored, mode="drop"))
        new.append(None if scale_buffer is None else scale_buffer.at[page_ids, :, slots].set(scales, mode="drop"))
    return KVPages(new[0], new[2], new[1], new[3])


def gather_rows(
    pages: KVPages, table: Int[Array, "B max_pages"], dtype: jnp.dtype
) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Keys and values of each sequence in order, S = max_pages * page; entries past a sequence's end may be anything."""
    out = []
    for rows, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales)):
        picked = None if scales is None else jnp.swapaxes(scales[table], -1, -2)
        decoded = decode_rows(rows[table], picked, dtype)
        out.append(decoded.reshape(table.shape[0], -1, decoded.shape[-1]))
    return out[0], out[1]


def _row_layout(head_dim: int, storage: Storage) -> tuple[int, int, jnp.dtype | None]:
    """Stored columns and scales of a row, and the dtype of the scales."""
    if storage not in _DTYPES:
        raise ValueError(f"storage is {storage!r}; allowed: {', '.join(_DTYPES)}")
    if storage == "int4":
        if head_dim % INT4_GROUP:
            raise ValueError(f"int4 needs a head size that is a multiple of {INT4_GROUP}; it is {head_dim}")
        return head_dim // 2, head_dim // INT4_GROUP, jnp.dtype(jnp.bfloat16)
    return head_dim, 1, jnp.dtype(jnp.float32) if storage == "fp8" else None
