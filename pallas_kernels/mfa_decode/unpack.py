"""Unpacks int4 rows for the tensor cores: keys to e4m3, which represents them exactly, and values to bfloat16, scaled.

A thread holds four bytes of a row in one register, eight numbers. Pallas has no shift of whole registers (shifts of
their single bytes take about three instructions per byte), nor of bytes to 16 bits: these two are a few lines of Mosaic,
which the interpreter replaces by plain `jax.numpy`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.compat import WGMMA_8BIT, WGMMA_8BIT_ROW, Ref, Target
from pallas_kernels.storage import INT4_GROUP

# Sign and magnitude of the first number of a byte: also an e4m3 number, the integer times 2^-9.
FIRST = 0x87
E4M3_UNIT = 2.0**9
# Bytes of a row, and the first or second numbers in them: 128 columns, two groups.
GROUPS = 2


def unpack_keys(target: Target, source: Ref, destination: Ref) -> None:
    """Writes bytes [64, 128] as e4m3 [4, 64, 64]: integers times 2^-9, group by group."""
    packed = target.load(source, WGMMA_8BIT)
    for part, bytes_ in enumerate((packed, exchange_halves(target, packed))):
        numbers = lax.bitcast_convert_type(bytes_ & jnp.uint8(FIRST), jnp.float8_e4m3fn)
        for half in range(GROUPS):
            destination.at[GROUPS * part + half][...] = numbers[:, half * INT4_GROUP : (half + 1) * INT4_GROUP]


def unpack_values(target: Target, source: Ref, scales: Ref, destination: Ref) -> None:
    """Writes bytes [64, 128] with scales [4, 64] as bfloat16 [64, 256]."""
    packed = target.load(source, WGMMA_8BIT)
    # Group by group from byte to store, as all at once would need more registers than there are.
    for part in range(2):
        for half in range(GROUPS):
            bytes_ = packed[:, half * INT4_GROUP : (half + 1) * INT4_GROUP]
            numbers, offsets = widen(target, exchange_halves(target, bytes_) if part else bytes_)
            group = GROUPS * part + half
            scale = lax.broadcast_in_dim(target.load(scales.at[group], WGMMA_8BIT_ROW), bytes_.shape, [0])
            # JAX 0.10 accepts the layout of `WGMMA`, whose rows are the same.
            scale = target.cast_layout(scale, WGMMA_8BIT)
            destination[:, group * INT4_GROUP : (group + 1) * INT4_GROUP] = (numbers - offsets) * scale


def exchange_halves(target: Target, packed: jax.Array) -> jax.Array:
    """Bytes whose bits `FIRST` are those of each byte's second number; the other bits are undefined."""
    if target.interpret:
        return (packed << 4) | (packed >> 4)

    def exchange(word: ir.Value) -> tuple[ir.Value]:
        low = arith.andi(arith.shrui(word, _number(4)), _number(0x0F0F0F0F))
        high = arith.andi(arith.shli(word, _number(4)), _number(0xF0F0F0F0))
        return (arith.ori(low, high),)

    return _map_registers(packed, exchange, (jnp.uint8,))[0]


def widen(target: Target, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 of the first numbers: their sign on 128 + magnitude, and on 128, so that the difference is the number."""
    if target.interpret:
        magnitudes, is_negative = (packed & jnp.uint8(7)).astype(jnp.bfloat16), packed >= 128
        return tuple(jnp.where(is_negative, -size, size) for size in (magnitudes + 128, jnp.full_like(magnitudes, 128)))

    def pair(word: ir.Value, selector: int) -> tuple[ir.Value, ir.Value]:
        # Two bytes, each twice: the sign is at bfloat16's sign, the magnitude at its last bits.
        twice = utils.prmt(word, word, _number(selector))
        numbers, offsets = (
            arith.ori(arith.andi(twice, _number(mask)), _number(0x43004300)) for mask in (0x80078007, 0x80008000)
        )
        return numbers, offsets

    def convert(word: ir.Value) -> tuple[ir.Value, ...]:
        pairs = pair(word, 0x1100), pair(word, 0x3322)
        halves = ir.VectorType.get((2,), ir.BF16Type.get())
        return tuple(
            utils.vector_concat([utils.bitcast(part, halves) for part in parts]) for parts in zip(*pairs, strict=True)
        )

    return _map_registers(packed, convert, (jnp.bfloat16, jnp.bfloat16))


def _number(value: int) -> ir.Value:
    return utils.c(value - (1 << 32 if value >> 31 else 0), ir.IntegerType.get_signless(32))


def _map_registers(
    packed: jax.Array, change: Callable[[ir.Value], tuple[ir.Value, ...]], dtypes: tuple[jax.typing.DTypeLike, ...]
) -> tuple[jax.Array, ...]:
    """Applies `change` to each register of four bytes: arrays of the same shape and layout."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA_8BIT,),
        return_type=tuple(plgpu.ShapeDtypeStruct(packed.shape, dtype, WGMMA_8BIT) for dtype in dtypes),
    )
    def run(_: object, array: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
        word = ir.IntegerType.get_signless(32)
        made = [np.empty_like(array.registers) for _ in dtypes]
        for place, register in np.ndenumerate(array.registers):
            for registers, value in zip(made, change(utils.bitcast(register, word)), strict=True):
                # Bytes come back as a word.
                is_word = str(value.type) == "i32"
                registers[place] = utils.bitcast(value, register.type) if is_word else value
        return tuple(
            mgpu.FragmentedArray(
                _registers=registers, _layout=array.layout, _is_signed=False if dtype == jnp.uint8 else None
            )
            for registers, dtype in zip(made, dtypes, strict=True)
        )

    return run(packed)
