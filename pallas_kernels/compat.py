"""Every difference between JAX versions, and between the interpreter and a GPU, that the kernels meet.

The Mosaic GPU backend of Pallas changes from version to version: 0.10.2 and 0.11.2 are supported. Its interpreter runs
copies, barriers, rings and loop bounds as written, but not a tensor-core product with one operand in registers, nor (in
0.10.2) loads with a layout. `Target` swaps just those for plain `jax.numpy`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

IS_0_11 = jax.__version_info__ >= (0, 11)

# Layout of a tensor-core accumulator over the threads of a warpgroup.
WGMMA = plgpu.Layout.WGMMA
# The same without the column axis, or without the row axis: what a reduction of it gives.
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)
WGMMA_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def swizzled(dtype: jax.typing.DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of a shared-memory buffer that a tensor-core product reads: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def transpose(ref: jax.Ref) -> jax.Ref:
    """A view of a 2-D shared-memory buffer with its axes exchanged."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel body is traced for.

    Attributes:
      interpret: For the interpreter; else for a GPU.
      detect_races: The interpreter looks for unordered accesses; see `race_check`.
    """

    interpret: bool = False
    detect_races: bool = False

    def kernel_options(self) -> dict[str, object]:
        """Keyword arguments of `plgpu.kernel`."""
        options: dict[str, object] = {"compiler_params": plgpu.CompilerParams(approx_math=True)}
        if self.interpret:
            options["interpret"] = InterpretGPUParams(detect_races=self.detect_races)
        return options

    def load(self, ref: jax.Ref, layout: plgpu.Layout | None = None) -> jax.Array:
        """Reads a buffer into registers, in `layout`."""
        if self.interpret:
            return ref[...]
        index = () if IS_0_11 else ((),)
        return plgpu.load(ref, *index, layout=layout, optimized=False)

    def cast_layout(self, value: jax.Array, layout: plgpu.Layout) -> jax.Array:
        """The same value in another register layout."""
        return value if self.interpret else plgpu.layout_cast(value, layout)

    def full(
        self, shape: Sequence[int], value: float, layout: plgpu.Layout, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> jax.Array:
        """A constant in `layout`."""
        return self.cast_layout(jnp.full(tuple(shape), value, dtype), layout)

    def iota(self, shape: Sequence[int], axis: int, layout: plgpu.Layout) -> jax.Array:
        """int32 indices along `axis`, in `layout`."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, tuple(shape), axis)
        return plgpu.broadcasted_iota(jnp.int32, tuple(shape), axis, layout=layout)

    def dot(self, left: jax.Ref, right: jax.Ref) -> jax.Array:
        """left [M, K] times right [N, K] transposed, float32 [M, N]; both are swizzled shared memory."""
        if self.interpret:
            return jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T)
        shape = (left.shape[0], right.shape[0])

        def run(accumulator: jax.Ref) -> jax.Array:
            plgpu.wgmma(accumulator, left, transpose(right))
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def add_dot(self, accumulator: jax.Array, left: jax.Array, right: jax.Ref) -> jax.Array:
        """accumulator [M, N] + left [M, K] (16-bit, in registers) times right [K, N] (swizzled shared memory)."""
        if self.interpret:
            return accumulator + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(accumulator))

    def finish_reads(self) -> None:
        """Call between the last read of a buffer and the barrier that frees it.

        On a GPU a finished tensor-core product has read its operands; the race detector sees plain reads in its place
        and wants them ordered.
        """
        if self.interpret:
            plgpu.commit_smem()


@contextmanager
def race_check() -> Iterator[None]:
    """Raises RuntimeError if the interpreter saw a race inside, and leaves it clean whatever happens."""
    try:
        yield
        if interpret_pallas_call.get_races().races_found:
            raise RuntimeError("the interpreter found a race between two accesses of one buffer")
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
