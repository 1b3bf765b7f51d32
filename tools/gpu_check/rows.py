"""Cases of the small operations between the products: the peer is XLA's own fusion of the same formula."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import pages as kv_pages
from pallas_kernels.moe_permute.api import permute_rows, plan_permutation
from pallas_kernels.norm_quantise.api import norm_quantise
from pallas_kernels.rope_cache_write.api import rope_cache_write
from pallas_kernels.storage import bytes_per_token
from pallas_kernels.swiglu_quantise.api import swiglu_quantise
from tools.gpu_check.case import ROUNDED_TOLERANCE, Case, Inputs, Peer, dequantised, normal

EPS = 1e-5
TOLERANCE = 5e-3
ROPE_TOLERANCE = {"bfloat16": 5e-3, "fp8": ROUNDED_TOLERANCE}
HEAD_DIM, LOW_RANK, NUM_LAYERS = 256, 2048, 3
_FROM_COLUMNS = functools.partial(dequantised, scales_layout="columns")


def row_cases(*, is_small: bool) -> list[Case]:
    """Each operation at an odd size for correctness, and at the sizes of decode and prefill for time.

    "joined": as a layer with joined products runs it, whose parts the kernel reads in place.
    """
    sizes = ((7, False),) if is_small else ((77, False), (64, True), (128, True), (4096, True))
    cases = []
    for rows, is_timed in sizes:
        cases.append(_norm(rows, 1024 if is_small else 7168, is_timed))
        cases.append(_swiglu(rows, 512 if is_small else 5120, is_timed))
        cases.append(_permute(rows, 256 if is_small else 7168, is_timed))
        for storage in ("fp8",) if is_small else ("bfloat16", "fp8"):
            cases.append(_rope(rows, storage, is_timed))
        if rows != 64:
            cases.append(_joined_norm(rows, 1024 if is_small else 2048, is_timed))
            cases.append(_joined_swiglu(rows, 512 if is_small else 5120, is_timed))
            cases.append(_rope(rows, "fp8", is_timed, is_joined=True))
    return cases


def _norm(rows: int, width: int, is_timed: bool) -> Case:
    def make(seed: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seed), 2)
        return normal(keys[0], (rows, width)), normal(keys[1], (width,))

    run = functools.partial(norm_quantise, eps=EPS)
    name, num_bytes = f"norm_quantise/{rows}x{width}", 3 * rows * width
    case = _case("norm_quantise", name, make, run, dequantised, num_bytes, is_timed)
    return dataclasses.replace(case, tolerance=ROUNDED_TOLERANCE)


def _joined_norm(rows: int, width: int, is_timed: bool) -> Case:
    """The low-rank query's norm: the first columns of q|k|v, with the norm's weights of a stack of layers."""

    def make(seed: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seed), 2)
        return normal(keys[0], (rows, width + 2 * HEAD_DIM)), normal(keys[1], (NUM_LAYERS, width))

    run = functools.partial(norm_quantise, eps=EPS, layer=NUM_LAYERS - 1, scales_layout="columns")
    name = f"norm_quantise/{rows}x{width}/joined"
    case = _case("norm_quantise", name, make, run, _FROM_COLUMNS, 3 * rows * width, is_timed)
    return dataclasses.replace(case, tolerance=ROUNDED_TOLERANCE)


def _swiglu(rows: int, width: int, is_timed: bool) -> Case:
    def make(seed: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seed), 2)
        return normal(keys[0], (rows, width)), normal(keys[1], (rows, width))

    name = f"swiglu_quantise/{rows}x{width}"
    return _case("swiglu_quantise", name, make, swiglu_quantise, dequantised, 5 * rows * width, is_timed)


def _joined_swiglu(rows: int, width: int, is_timed: bool) -> Case:
    """Of gate and up side by side."""

    def make(seed: int) -> Inputs:
        return (normal(jax.random.key(seed), (rows, 2 * width)),)

    run = functools.partial(swiglu_quantise, scales_layout="columns")
    name = f"swiglu_quantise/{rows}x{width}/joined"
    return _case("swiglu_quantise", name, make, run, _FROM_COLUMNS, 5 * rows * width, is_timed)


def _permute(rows: int, width: int, is_timed: bool) -> Case:
    def make(seed: int) -> Inputs:
        random = np.random.default_rng(seed)
        experts = np.stack([random.choice(48, 3, replace=False) for _ in range(rows)])
        permutation = plan_permutation(jnp.asarray(experts, jnp.int32), num_experts=48)
        return normal(jax.random.key(seed), (rows, width)), permutation

    def view(permuted: jax.Array, inputs: Inputs) -> jax.Array:
        """Rows that hold no pair may hold anything."""
        return jnp.where((inputs[1].tokens < rows)[:, None], permuted, 0)

    num_bytes = 2 * 2 * 3 * rows * width
    return _case("moe_permute", f"permute_rows/{rows}x{width}", make, permute_rows, view, num_bytes, is_timed)


def _rope(rows: int, storage: str, is_timed: bool, *, is_joined: bool = False) -> Case:
    """`is_joined`: keys and values are columns of q|k|v, and queries come out in float16, which fp8 pages want."""
    num_pages = rows // kv_pages.PAGE_SIZE + 2

    def make(seed: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seed), 4)
        places = np.random.default_rng(seed).permutation(num_pages * kv_pages.PAGE_SIZE)[:rows]
        ids = places // kv_pages.PAGE_SIZE
        if not is_timed:
            ids[::5], ids[1::7] = -1, num_pages
        angles = jax.random.uniform(keys[3], (rows, 128), maxval=6.0)
        columns = LOW_RANK + 2 * HEAD_DIM if is_joined else HEAD_DIM
        parts = [normal(key, (rows, columns)) for key in keys[1:3]]
        return (
            normal(keys[0], (rows, 64, HEAD_DIM)),
            parts[0],
            parts[0] if is_joined else parts[1],
            jnp.cos(angles),
            jnp.sin(angles),
            kv_pages.empty_pages(num_pages, 256, storage),
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(places % kv_pages.PAGE_SIZE, jnp.int32),
        )

    def view(output: tuple[jax.Array, kv_pages.KVPages], _: Inputs) -> object:
        """Queries, and the pages' rows as numbers."""
        rotated, pages = output
        decoded = []
        for name in ("key", "value"):
            scales = getattr(pages, f"{name}_scales")
            scales = None if scales is None else jnp.swapaxes(scales, 1, 2)
            decoded.append(kv_pages.decode_rows(getattr(pages, f"{name}s"), scales, jnp.dtype(jnp.float32)))
        return rotated, decoded

    num_bytes = rows * (2 * 2 * 64 * 256 + 4 * 256 + 1024 + bytes_per_token(256, storage))
    name = f"rope_cache_write/{storage}/{rows}" + ("/joined" if is_joined else "")
    options = {"key_at": LOW_RANK, "value_at": LOW_RANK + HEAD_DIM, "query_dtype": jnp.float16} if is_joined else {}
    run = functools.partial(rope_cache_write, **options)
    case = _case("rope_cache_write", name, make, run, view, num_bytes, is_timed)
    return dataclasses.replace(
        case,
        tolerance=ROPE_TOLERANCE[storage],
        tuned=(),
        # The pages of the last call go into the next, as in a model's step: nothing copies them.
        carry=lambda inputs, last: (*inputs[:5], last[1], *inputs[6:]),
    )


def _case(
    kernel: str,
    name: str,
    make: Callable[[int], Inputs],
    run: Callable[..., object],
    view: Callable[[object, Inputs], object],
    num_bytes: int,
    is_timed: bool,
) -> Case:
    return Case(
        name=name,
        kernel=kernel,
        make=make,
        run=run,
        view=view,
        tolerance=TOLERANCE,
        num_bytes=num_bytes if is_timed else 0,
        peers={"xla": Peer(functools.partial(run, implementation="reference"))} if is_timed else {},
        # The others ask for no blocks.
        tuned=(kernel,) if is_timed and kernel == "moe_permute" else (),
    )
