"""Pages of a KV cache with one key/value head: 64 tokens a page, in four storage formats.

| storage | values | scales | bytes a token and layer, K = 256 |
| --- | --- | --- | --- |
| float32 | float32 | - | 2,048 |
| bfloat16 | bfloat16 | - | 1,024 |
| fp8 | float8_e4m3fn | one float32 a token: max|row| / 448 | 520 |
| int4 | two of -7..7 in a byte | one bfloat16 for 64 columns of a token: max|group| / 7 | 272 |

In int4 byte j of a row holds columns j and j + K/2, each as a sign and a magnitude m: of the first the sign is bit 7 and m
bits 0 to 2, of the second bit 3 and bits 4 to 6. So the first, all other bits cleared, is the e4m3 number m * 2^-9 (which
has no leading one, but is exact), and the second is, with the halves of the byte exchanged. A row of zeros has scale 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.storage import PAGE_SIZE, STORAGES, Storage, row_layout

FP8_MAX = 448.0
INT4_MAX = 7.0

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8}
_SCALE_DTYPES = {"fp8": jnp.dtype(jnp.float32), "int4": jnp.dtype(jnp.bfloat16)}
# Floats as integers of their width, see `empty_pages`; signed, since an unsigned byte is int4.
_BITS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.int16), jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.int8)}
_FLOATS = {bits: dtype for dtype, bits in _BITS.items()}


class KVPages(NamedTuple):
    """Pages of one layer, or a pool of all layers'. C = K, or K/2 in int4; G = scales of a row: 1 in fp8, K/64 in int4.

    Attributes:
      keys, values: Stored rows, [P, page, C].
      key_scales, value_scales: [P, G, page]; None where rows are stored unscaled.
    """

    keys: Num[Array, "P page C"]
    values: Num[Array, "P page C"]
    key_scales: Num[Array, "P G page"] | None = None
    value_scales: Num[Array, "P G page"] | None = None

    @property
    def storage(self) -> Storage:
        """The format, read off the dtype."""
        for name in STORAGES:
            if _FLOATS.get(self.keys.dtype, self.keys.dtype) == _DTYPES[name]:
                return name
        raise ValueError(f"pages of {self.keys.dtype} have no known format: {', '.join(STORAGES)}")

    @property
    def is_bits(self) -> bool:
        """Whether floats are held as integers, see `empty_pages`."""
        return self.keys.dtype in _FLOATS or (self.key_scales is not None and self.key_scales.dtype in _FLOATS)

    @property
    def num_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def page_size(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2] * (2 if self.storage == "int4" else 1)


class CachedTokens(NamedTuple):
    """What a batch of sequences has in the cache: all that attention reads.

    Attributes:
      pages: One layer's cache, or that of all layers in one pool. A page's rows past a sequence's end may hold anything.
      table: Pages of each sequence in order; entries past its end may hold anything.
      lengths: Cached tokens of each sequence, those whose queries are given among them; 0 for an empty place in the batch.
      first_page: Added to every page of the table: where a layer's pages start in the pool; may be traced, so that layers
        share one table.
    """

    pages: KVPages
    table: Int[Array, "B max_pages"]
    lengths: Int[Array, " B"]
    first_page: Int[Array, ""] | int = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that a row of the table has room for."""
        return self.table.shape[1] * self.pages.page_size


def empty_pages(
    num_pages: int, head_dim: int, storage: Storage, *, page_size: int = PAGE_SIZE, as_bits: bool = False
) -> KVPages:
    """Pages of zeros.

    Args:
      num_pages: P.
      head_dim: K.
      storage: See above.
      page_size: Tokens of a page.
      as_bits: Whether bfloat16 and float8 are held as integers of their width, for the references on CPUs: to write one
        row of these XLA:CPU turns the whole buffer to a wider float and back. The kernels take no such pages.

    Raises:
      ValueError: For a storage that does not exist, or a head size that int4 cannot cut in groups.
    """
    layout, scale_dtype = row_layout(head_dim, storage), _SCALE_DTYPES.get(storage)
    dtype = jnp.dtype(_DTYPES[storage])

    def buffers() -> tuple[Array, Array | None]:
        rows = jnp.zeros((num_pages, page_size, layout.columns), _BITS.get(dtype, dtype) if as_bits else dtype)
        scales = None if scale_dtype is None else jnp.ones((num_pages, layout.num_scales, page_size), scale_dtype)
        if scales is not None and as_bits:
            scales = _cast_bits(scales, _BITS.get(scales.dtype, scales.dtype))
        return rows, scales

    # Buffers of their own for keys and values, or they could not be given away to be written in place.
    (keys, key_scales), (values, value_scales) = buffers(), buffers()
    return KVPages(keys, values, key_scales, value_scales)


def contiguous_pages(
    keys: Float[Array, "B S K"], values: Float[Array, "B S K"], *, page_size: int = PAGE_SIZE
) -> tuple[KVPages, Int[Array, "B max_pages"]]:
    """A cache with one row of S tokens for each sequence, as pages and their table; nothing is copied.

    Raises:
      ValueError: If the tokens are not whole pages, or the dtype is one that needs scales.
    """
    batch, tokens, head_dim = keys.shape
    if tokens % page_size:
        raise ValueError(f"{tokens} tokens are not whole pages of {page_size}: pad them to a multiple")
    if keys.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"rows are {keys.dtype}; allowed without scales: float32, bfloat16")
    shape = (batch * tokens // page_size, page_size, head_dim)
    table = jnp.arange(shape[0], dtype=jnp.int32).reshape(batch, tokens // page_size)
    return KVPages(keys.reshape(shape), values.reshape(shape)), table


def encode_rows(rows: Float[Array, "*lead K"], storage: Storage) -> tuple[Array, Array | None]:
    """Rows as they are stored, [*lead, C], and their scales, [*lead, G], if the format has them."""
    layout, scale_dtype = row_layout(rows.shape[-1], storage), _SCALE_DTYPES.get(storage)
    if scale_dtype is None:
        return rows.astype(_DTYPES[storage]), None
    grouped = rows.astype(jnp.float32).reshape(*rows.shape[:-1], layout.num_scales, -1)
    largest = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
    scales = jnp.where(largest > 0, largest / (FP8_MAX if storage == "fp8" else INT4_MAX), 1.0).astype(scale_dtype)
    scaled = (grouped / scales.astype(jnp.float32)).reshape(rows.shape)
    if storage == "fp8":
        stored = jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    else:
        numbers = jnp.clip(jnp.round(scaled), -INT4_MAX, INT4_MAX)
        magnitudes = jnp.split(jnp.abs(numbers).astype(jnp.uint8), 2, axis=-1)
        signs = jnp.split((numbers < 0).astype(jnp.uint8), 2, axis=-1)
        stored = magnitudes[0] | (signs[0] << 7) | (magnitudes[1] << 4) | (signs[1] << 3)
    return stored, scales[..., 0]


def decode_rows(
    stored: Num[Array, "*lead C"], scales: Num[Array, "*lead G"] | None, dtype: jax.typing.DTypeLike
) -> Float[Array, "*lead K"]:
    """The inverse of `encode_rows` up to rounding: value * scale in float32, then cast to `dtype`."""
    stored = _cast_bits(stored, _FLOATS.get(stored.dtype, stored.dtype))
    if scales is None:
        return stored.astype(dtype)
    scales = _cast_bits(scales, _FLOATS.get(scales.dtype, scales.dtype))
    if stored.dtype == jnp.uint8:
        magnitudes = jnp.concatenate([stored & 7, (stored >> 4) & 7], axis=-1).astype(jnp.float32)
        values = jnp.where(jnp.concatenate([stored >> 7, (stored >> 3) & 1], axis=-1) > 0, -magnitudes, magnitudes)
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
    if keys.shape[0] == 1:
        # XLA:CPU merges a lone update into what reads the pages, and then copies all of them. Of two rows, the second
        # dropped, it makes a scatter in place. For other platforms the second row does no harm.
        keys, values, slots = (jnp.repeat(array, 2, axis=0) for array in (keys, values, slots))
        page_ids = jnp.append(page_ids, pages.num_pages)

    def write(rows: Array, buffer: Array, scale_buffer: Array | None) -> tuple[Array, Array | None]:
        stored, scales = encode_rows(rows, pages.storage)
        buffer = buffer.at[page_ids, slots].set(_cast_bits(stored, buffer.dtype), mode="drop")
        if scale_buffer is None or scales is None:
            return buffer, None
        scales = _cast_bits(scales, scale_buffer.dtype)
        return buffer, scale_buffer.at[page_ids, :, slots].set(scales, mode="drop")

    new_keys, key_scales = write(keys, pages.keys, pages.key_scales)
    new_values, value_scales = write(values, pages.values, pages.value_scales)
    return KVPages(new_keys, new_values, key_scales, value_scales)


def gather_rows(
    pages: KVPages, table: Int[Array, "B max_pages"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Keys and values of each sequence in order, S = max_pages * page; entries past a sequence's end may be anything."""
    out = []
    for rows, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales)):
        picked = None if scales is None else jnp.swapaxes(scales[table], -1, -2)
        decoded = decode_rows(rows[table], picked, dtype)
        out.append(decoded.reshape(table.shape[0], -1, decoded.shape[-1]))
    return out[0], out[1]


def _cast_bits(array: Num[Array, "*shape"], dtype: jax.typing.DTypeLike) -> Num[Array, "*shape"]:
    """The same bits in another dtype of the same width."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)
