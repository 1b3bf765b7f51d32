"""Cases of the matrix products: dense FP8, and the experts'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul.api import moe_ffn
from pallas_kernels.quantise import quantise_rows
from tools.gpu_check.case import Case, Inputs, Peer, normal
from tools.gpu_check.measure import xla_fp8

# Against the same quantised numbers multiplied in float32; what is left is the rounding of the bfloat16 result.
TOLERANCE = 5e-3
# Two quantisations of activations lie between: input, and what goes into the down-projection.
MOE_TOLERANCE = {"bfloat16": 1e-2, "fp8": 2e-2}
HIDDEN, EXPERT_WIDTH, NUM_EXPERTS, TOP_K = 7168, 5120, 48, 3
# A product of fewer bytes takes so few microseconds that a launch's ramp and tail, about four, are a fifth of it.
SMALL_PRODUCT_BYTES = 20_000_000
SMALL_PRODUCT = "not judged alone: a product under 20 MB is mostly its launch; see rank_step"
# (N, K) of q down, q up, o, shared gate and up, shared down, dense gate and up.
DECODE_SHAPES = ((2048, 7168), (16_384, 2048), (7168, 16_384), (5120, 7168), (7168, 5120), (18_432, 7168))

SMALL_TIMED = (64, 256, 256)
TUNED = ((64, 7168, 16_384), (64, 2048, 7168), (128, 5120, 7168), (4096, 7168, 16_384), SMALL_TIMED)


def matmul_cases(*, is_small: bool) -> list[Case]:
    """Correctness at ragged sizes and in a stack of layers, then times at the model's shapes."""
    edges = [(1, 256, 256), (70, 192, 400)] if is_small else [(1, 2048, 7168), (77, 2000, 7168), (300, 5120, 1424)]
    cases = [_matmul(m, n, k) for m, n, k in edges]
    cases.append(_matmul(70 if is_small else 100, 256, 256, num_layers=3))
    if is_small:
        # A rehearsal of the timing: the references stand in.
        return [*cases, _matmul(*SMALL_TIMED, is_timed=True)]
    # One in which a cluster shares the weight's rows.
    cases.append(_matmul(128, 2048, 7168))
    for n, k in DECODE_SHAPES:
        cases.append(_matmul(64, n, k, is_timed=True, goal=0.85))
    for m, n, k in ((1, 7168, 16_384), (128, 5120, 7168), (128, 18_432, 7168)):
        cases.append(_matmul(m, n, k, is_timed=True))
    for n, k in ((7168, 16_384), (5120, 7168), (7168, 5120)):
        # As fast as XLA's own FP8 product, which has one scale for all.
        cases.append(_matmul(4096, n, k, is_timed=True, goal=1.0 if k == 16_384 else None))
    return cases


def _matmul(
    m: int, n: int, k: int, *, num_layers: int | None = None, is_timed: bool = False, goal: float | None = None
) -> Case:
    num_bytes = m * k + n * k + 2 * m * n
    run = fp8_matmul if num_layers is None else functools.partial(fp8_matmul, layer=num_layers - 1)
    return Case(
        name=f"fp8_matmul/{m}x{n}x{k}" + (f"/layer-of-{num_layers}" if num_layers else ""),
        kernel="fp8_matmul",
        make=functools.partial(_matmul_inputs, m, n, k, num_layers),
        run=run,
        tolerance=TOLERANCE,
        num_bytes=num_bytes if is_timed else 0,
        flops=2 * m * n * k,
        rate="fp8",
        goal=goal,
        exception=SMALL_PRODUCT if goal is not None and num_bytes < SMALL_PRODUCT_BYTES else None,
        peers={"xla-fp8": Peer(xla_fp8, _unscaled)} if is_timed else {},
        tuned=("fp8_matmul",) if is_timed and (m, n, k) in TUNED else (),
    )


def _matmul_inputs(m: int, n: int, k: int, num_layers: int | None, seed: int) -> Inputs:
    keys = jax.random.split(jax.random.key(seed), 2)
    x, x_scales = quantise_rows(normal(keys[0], (m, k)))
    return x, x_scales, *scaled_weight(keys[1], (() if num_layers is None else (num_layers,)) + (n, k))


def scaled_weight(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """e4m3 numbers of full range, and scales of 128 x 128 blocks such that the weight has variance 1 / K."""
    keys = jax.random.split(key, 2)
    values = normal(keys[0], shape, jnp.float8_e4m3fn, 100.0)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = jax.random.uniform(keys[1], blocks, minval=0.5, maxval=1.5) * (shape[-1] ** -0.5 / 100.0)
    return values, scales


def _unscaled(x: jax.Array, _: jax.Array, weight: jax.Array, __: jax.Array) -> Inputs:
    return x, weight, jnp.ones((), jnp.bfloat16)


def moe_cases(*, is_small: bool) -> list[Case]:
    """Correctness with empty experts, one expert for all and skewed loads; times of one rank, one layer, and prefill."""
    cases = []
    if is_small:
        for storage in ("bfloat16", "fp8"):
            cases.append(_moe(storage, 20, 4, "skewed", hidden=256, width=128, num_routed=8))
        return cases
    for storage in ("bfloat16", "fp8"):
        for load in ("uniform", "one", "skewed"):
            cases.append(_moe(storage, 200, 6, load, hidden=1024, width=512))
    # Too many pairs for tiles of 64 rows: tiles of 128, the form of long prefills and of many ranks.
    cases.append(_moe("fp8", 700, 6, "skewed", hidden=1024, width=512))
    # One EP8 rank: the tokens of all eight, of which about one pair in eight is this rank's.
    for num_tokens in (256, 1024):
        cases.append(_moe("fp8", num_tokens, 6, "uniform", is_timed=True, goal=0.85))
    cases.append(_moe("fp8", 1024, 6, "skewed", is_timed=True))
    cases.append(_moe("fp8", 256, 48, "uniform", is_timed=True, goal=0.85))
    cases.append(_moe("bfloat16", 256, 6, "uniform", is_timed=True))
    # 1,150 TFLOP/s where XLA's large product reaches some 1,350.
    cases.append(_moe("fp8", 2731, 48, "uniform", is_timed=True, goal=0.85))
    return cases


def _moe(
    storage: str,
    num_tokens: int,
    num_experts: int,
    load: str,
    *,
    hidden: int = HIDDEN,
    width: int = EXPERT_WIDTH,
    num_routed: int = NUM_EXPERTS,
    is_timed: bool = False,
    goal: float | None = None,
) -> Case:
    pairs = num_tokens * TOP_K * num_experts // num_routed
    itemsize = 1 if storage == "fp8" else 2
    num_bytes = 3 * num_experts * hidden * width * itemsize + 2 * 2 * num_tokens * hidden
    # XLA's ragged product reads as if each expert had all rows, so it is shown only once, on a small case.
    has_peer = is_timed and storage == "bfloat16"
    return Case(
        name=f"moe_ffn/{storage}/{num_tokens}x{num_experts}of{num_routed}/{load}",
        kernel="grouped_matmul",
        make=functools.partial(_moe_inputs, storage, num_tokens, num_experts, num_routed, load, hidden, width),
        run=functools.partial(moe_ffn, all_experts=num_routed),
        tolerance=None if is_timed else MOE_TOLERANCE[storage],
        num_bytes=num_bytes if is_timed else 0,
        flops=6 * pairs * hidden * width,
        rate="fp8" if storage == "fp8" else "bf16",
        goal=goal,
        peers={"ragged_dot": Peer(_ragged, _sorted)} if has_peer else {},
        tuned=("moe_ffn", "grouped_gate_up", "grouped_down")
        if is_timed and load == "uniform" and storage == "fp8"
        else (),
    )


def _moe_inputs(
    storage: str, num_tokens: int, num_experts: int, num_routed: int, load: str, hidden: int, width: int, seed: int
) -> Inputs:
    keys = jax.random.split(jax.random.key(seed), 5)
    random = np.random.default_rng(seed)
    # "skewed" falls like 1 / rank; all of them but the uniform one have an expert without tokens.
    odds = {"uniform": np.ones(num_routed), "skewed": 1 / np.arange(1, num_routed + 1), "one": np.zeros(num_routed)}[
        load
    ]
    if load == "one":
        odds[:TOP_K] = 1.0
    elif load == "skewed":
        odds[1] = 0.0
    experts = np.stack(
        [random.choice(num_routed, TOP_K, replace=False, p=odds / odds.sum()) for _ in range(num_tokens)]
    )
    weights = jax.nn.softmax(normal(keys[0], (num_tokens, TOP_K), jnp.float32))
    shapes = ((num_experts, width, hidden), (num_experts, width, hidden), (num_experts, hidden, width))
    if storage == "fp8":
        stacks: list[object] = [scaled_weight(key, shape) for key, shape in zip(keys[2:], shapes, strict=True)]
    else:
        stacks = [normal(key, shape, scale=shape[-1] ** -0.5) for key, shape in zip(keys[2:], shapes, strict=True)]
    return normal(keys[1], (num_tokens, hidden)), weights, jnp.asarray(experts, jnp.int32), *stacks


def _sorted(x: jax.Array, _: jax.Array, experts: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> Inputs:
    """This shard's pairs, sorted by expert, as `ragged_dot` expects them."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=int(flat.max()) + 1)[: gate.shape[0]].astype(jnp.int32)
    rows = x[order[: int(sizes.sum())] // experts.shape[1]]
    return rows, sizes, *(jnp.swapaxes(stack, 1, 2) for stack in (gate, up, down))


def _ragged(rows: jax.Array, sizes: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(inner, down, sizes)
