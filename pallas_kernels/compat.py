"""All differences between JAX versions, and between the interpreter and a GPU, that affect the kernels.

The Mosaic GPU backend of Pallas changes from version to version: 0.10.2 and 0.11.2 are supported. Its interpreter runs
copies, barriers, rings and loop bounds as written, but not a tensor-core product with one operand in registers, nor (in
0.10.2) loads with a layout. `Target` replaces only those by plain `jax.numpy`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.core import SomeLayout
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state.types import TransformedRef
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# A buffer, or a view of one: the arguments of a kernel body.
Ref = jax.Ref | TransformedRef

IS_0_11 = jax.__version_info__ >= (0, 11)

# Layout of a tensor-core accumulator over the threads of a warpgroup.
WGMMA = plgpu.Layout.WGMMA
# The same without the column axis, or without the row axis: the layout of a reduction.
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)
WGMMA_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# Layout of an 8-bit operand: a thread has four neighbours of a row, so that it reads 4 bytes at a time.
WGMMA_8BIT = plgpu.Layout.WGMMA_8BIT
WGMMA_8BIT_ROW = plgpu.Layout.WGMMA_8BIT.reduce(1)


def swizzled(dtype: jax.typing.DTypeLike, row_bytes: int = 128) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of a shared-memory buffer that a tensor-core product reads: rows of 128 bytes or less, swizzled."""
    return plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(row_bytes)


def unswizzled() -> tuple[plgpu.TilingTransform, ...]:
    """Transforms of a buffer for rows of an array that is not in whole tiles of 8 rows, which swizzled buffers cannot take.

    0.11 chooses a swizzle by itself if none is given; 0.10.2 has no tiles without one.
    """
    return (plgpu.TilingTransform((4, 64)),) if IS_0_11 else ()


def transpose(ref: Ref) -> Ref:
    """A view of a 2-D shared-memory buffer with its axes swapped."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel body is traced for.

    Attributes:
      interpret: Whether for the interpreter; else for a GPU.
      detect_races: The interpreter looks for unordered accesses; see `race_check`.
    """

    interpret: bool = False
    detect_races: bool = False

    @property
    def clips_copies(self) -> bool:
        """Whether a copy may extend past the end of an array, reading zeros there and writing nothing.

        TMA does so on a GPU; the interpreter of 0.10.2 treats it as an error, so arrays must be padded for it.
        """
        return IS_0_11 or not self.interpret

    @property
    def has_clusters(self) -> bool:
        """Whether CTAs may form clusters: the interpreter of 0.10.2 has no barriers for them."""
        return IS_0_11 or not self.interpret

    def kernel_options(self, reduction_scratch_bytes: int = 2048, *, auto_barriers: bool = True) -> dict[str, object]:
        """Keyword arguments of `plgpu.kernel`.

        Args:
          reduction_scratch_bytes: Shared memory for reductions across a warpgroup's warps.
          auto_barriers: Whether the compiler puts a warpgroup barrier before and after each store. Without it,
            `plgpu.commit_smem` is needed wherever a thread reads what another of its warpgroup wrote, or writes what
            another, or a product of another's warp, may still read. The interpreter runs a warpgroup as one thread and
            does not notice a missing one.
        """
        params = plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=reduction_scratch_bytes,
            unsafe_no_auto_barriers=not auto_barriers,
        )
        options: dict[str, object] = {"compiler_params": params}
        if self.interpret:
            options["interpret"] = InterpretGPUParams(detect_races=self.detect_races)
        return options

    def load(self, ref: Ref, layout: SomeLayout | None = None) -> jax.Array:
        """Reads a buffer into registers, in `layout`."""
        if self.interpret:
            return ref[...]
        index = () if IS_0_11 else ((),)
        return plgpu.load(ref, *index, layout=layout, optimized=False)

    def cast_layout(self, value: jax.Array, layout: SomeLayout) -> jax.Array:
        """The same value in another register layout."""
        return value if self.interpret else plgpu.layout_cast(value, layout)

    def full(
        self, shape: Sequence[int], value: float, layout: SomeLayout, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> jax.Array:
        """A constant in `layout`."""
        return self.cast_layout(jnp.full(tuple(shape), value, dtype), layout)

    def iota(self, shape: Sequence[int], axis: int, layout: SomeLayout) -> jax.Array:
        """int32 indices along `axis`, in `layout`."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, tuple(shape), axis)
        return plgpu.broadcasted_iota(jnp.int32, tuple(shape), axis, layout=layout)

    def dot(self, left: Ref, right: Ref, meanwhile: Callable[[], None] | None = None) -> jax.Array:
        """left [M, K] times right [N, K] transposed, float32 [M, N]; both are swizzled shared memory.

        `meanwhile` is called while the product is in flight and nothing has waited for it yet.
        """
        return self.dot_pairs([(left, right)], meanwhile)

    def dot_pairs(self, pairs: Sequence[tuple[Ref, Ref]], meanwhile: Callable[[], None] | None = None) -> jax.Array:
        """The sum of `dot` products of pairs of equal shapes, in one accumulator."""
        if self.interpret:
            products = [
                jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T) for left, right in pairs
            ]
            if meanwhile is not None:
                meanwhile()
            return functools.reduce(jnp.add, products)
        shape = (pairs[0][0].shape[0], pairs[0][1].shape[0])

        def run(accumulator: Ref) -> jax.Array:
            for left, right in pairs:
                plgpu.wgmma(accumulator, left, transpose(right))
            if meanwhile is not None:
                meanwhile()
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def add_dot(self, accumulator: jax.Array, left: jax.Array, right: Ref) -> jax.Array:
        """accumulator [M, N] + left [M, K] (16-bit, in registers) times right [K, N] (swizzled shared memory)."""
        if self.interpret:
            return accumulator + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(accumulator))

    def sum_dots(
        self,
        steps: int,
        num_sums: int,
        shape: tuple[int, int],
        operands: Callable[[jax.Array], Sequence[tuple[Ref, Ref]]],
        release: Callable[[jax.Array], None],
    ) -> tuple[jax.Array, ...]:
        """`num_sums` sums over `steps` of `dot`, float32 `shape` each; on a GPU they stay in the accumulators.

        `operands` returns the operands of a step and may wait for them; `release` is called when the step has read them.
        """
        if self.interpret:

            def add(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                new = tuple(old + self.dot(*pair) for old, pair in zip(sums, operands(step), strict=True))
                release(step)
                return new

            return lax.fori_loop(0, steps, add, (jnp.zeros(shape, jnp.float32),) * num_sums)

        def run(*accumulators: Ref) -> tuple[jax.Array, ...]:
            def add_in_place(step: jax.Array, _: tuple[()]) -> tuple[()]:
                for accumulator, (left, right) in zip(accumulators, operands(step), strict=True):
                    plgpu.wgmma(accumulator, left, transpose(right))
                plgpu.wgmma_wait(0)
                release(step)
                return ()

            lax.fori_loop(0, steps, add_in_place, ())
            return tuple(accumulator[...] for accumulator in accumulators)

        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32),) * num_sums)

    def finish_reads(self) -> None:
        """Call between the last read of a buffer and the barrier that frees it.

        On a GPU a finished tensor-core product has read its operands; the race detector sees plain reads instead
        and needs them ordered.
        """
        if self.interpret:
            plgpu.commit_smem()


def mutating_kernel(
    body: Callable[..., None],
    *,
    out_type: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Sequence[object],
    name: str,
    **options: object,
) -> Callable[..., jax.Array]:
    """Like `plgpu.kernel` with one warpgroup, but modifies arguments that are `jax.new_ref(..., memory_space=plgpu.GMEM)`.

    `plgpu.kernel` of 0.10.2 wraps the call so that it can be vmapped, and that wrapper does not take references.
    """

    def whole(*refs: Ref) -> None:
        pl.run_scoped(functools.partial(body, *refs), *scratch_types, collective_axes=())

    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names)
    kernel = pl.kernel(whole, out_type=(out_type,), mesh=mesh, name=name, **options)
    return lambda *args: kernel(*args)[0]


@contextmanager
def race_check() -> Iterator[None]:
    """Raises RuntimeError if the interpreter detected a race inside, and resets it in any case."""
    try:
        yield
        if interpret_pallas_call.get_races().races_found:
            raise RuntimeError("the interpreter found a race between two accesses of one buffer")
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
