"""Cases of attention: decode over a paged cache, prefill, and the vision tower's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import pages as kv_pages
from pallas_kernels.common import Implementation
from pallas_kernels.mfa_decode.api import mfa_decode, mfa_decode_quantised, plan_decode
from pallas_kernels.mfa_decode.plan import Plan
from pallas_kernels.mfa_prefill.api import dense_attention, mfa_prefill
from pallas_kernels.pages import CachedTokens
from pallas_kernels.quantise import quantise_rows
from pallas_kernels.storage import Storage, bytes_per_token
from step3_jax.sampling.speculation import MAX_SPECULATIVE_TOKENS
from tools.gpu_check.case import ROUNDED_TOLERANCE, Case, Inputs, Peer, as_it_is, dequantised, normal

HEAD_DIM = 256
NUM_HEADS = 64
PAGE = kv_pages.PAGE_SIZE
# Against the reference on the same stored values: float16 and bfloat16 products, summed in float32.
TOLERANCE = {"bfloat16": 5e-3, "fp8": 5e-3, "int4": 1e-2}
GOALS = {"bfloat16": 0.95, "fp8": 0.90, "int4": 0.75}
EDGES = (0, 1, PAGE - 1, PAGE, PAGE + 1)


def decode_cases(*, is_small: bool) -> list[Case]:
    """Correctness over ragged lengths in every storage, then times over batch and context."""
    edges = (*EDGES, 150) if is_small else (*EDGES, 4096, 65_536, 3_000)
    forms = (
        _decode("bfloat16", edges),
        _decode("fp8", edges),
        _decode("int4", edges),
        _decode("fp8", edges, num_tokens=4, num_heads=16),
        # As a model in FP8 runs them: rotated queries in float16, heads quantised in the combine.
        _decode("fp8", edges, query_dtype=jnp.float16),
        _decode("fp8", edges, query_dtype=jnp.float16, is_quantised=True),
        _decode("bfloat16", edges, is_quantised=True),
        _decode("fp8", edges, num_tokens=3, query_dtype=jnp.float16, is_quantised=True),
        # With the most guesses that a step may have.
        _decode("fp8", edges, num_tokens=1 + MAX_SPECULATIVE_TOKENS, query_dtype=jnp.float16, is_quantised=True),
    )
    if is_small:
        return [forms[0], forms[1], forms[5]]
    cases = list(forms)
    shapes: dict[Storage, list[tuple[int, int]]] = {
        "bfloat16": [(64, 8192), (64, 32_768), (8, 32_768), (1, 32_768)],
        "fp8": [(64, 8192), (128, 4096), (64, 32_768), (8, 32_768), (1, 32_768), (8, 65_536)],
        "int4": [(64, 8192), (64, 32_768)],
    }
    for storage, sizes in shapes.items():
        for batch, length in sizes:
            cases.append(_decode(storage, (length,) * batch, is_timed=True))
            if cases[-1].goal is not None:
                # As a step of many layers runs it: they share the plan.
                cases.append(_planned(cases[-1], storage))
        ragged = tuple(int(length) for length in np.random.default_rng(0).integers(1024, 8193, 64))
        cases.append(_decode(storage, ragged, is_timed=True))
    for batch, length in ((64, 8192), (128, 4096)):
        for is_quantised in (False, True):
            half = _decode("fp8", (length,) * batch, query_dtype=jnp.float16, is_quantised=is_quantised, is_timed=True)
            cases.append(_planned(half, "fp8"))
    # A token and four guesses.
    several = _decode("fp8", (8192,) * 64, num_tokens=5, query_dtype=jnp.float16, is_quantised=True, is_timed=True)
    cases.append(_planned(several, "fp8"))
    return cases


def _decode(
    storage: Storage,
    lengths: tuple[int, ...],
    *,
    num_tokens: int = 1,
    num_heads: int = NUM_HEADS,
    query_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    is_quantised: bool = False,
    is_timed: bool = False,
) -> Case:
    is_full, is_half = len(set(lengths)) == 1, query_dtype == jnp.float16
    size = f"{len(lengths)}x{lengths[0] if is_full else 'ragged'}" if is_timed else "edges"
    form = ("" if num_tokens == 1 else f"-{num_tokens}x{num_heads}") + ("/float16" if is_half else "")
    # A query's numbers are 2 bytes, a head's 2, or 1 and a scale for each 128.
    head_bytes = 1 + 4 / 128 if is_quantised else 2
    num_bytes = sum(lengths) * bytes_per_token(HEAD_DIM, storage)
    num_bytes += int((2 + head_bytes) * len(lengths) * num_tokens * num_heads * HEAD_DIM)
    is_plain = not is_quantised and not is_half
    peers: dict[str, Peer] = {}
    if is_timed and is_full and storage == "bfloat16":
        peers["cudnn"] = Peer(_cudnn_decode, _contiguous)
    if is_timed and is_quantised:
        peers["apart"] = Peer(_attend_then_quantise)
    tolerance = ROUNDED_TOLERANCE if is_quantised else TOLERANCE[storage]
    return Case(
        name=f"mfa_decode{'_quantised' if is_quantised else ''}/{storage}/{size}{form}",
        kernel="mfa_decode",
        make=functools.partial(_decode_inputs, storage, lengths, num_tokens, num_heads, query_dtype),
        run=_attend_quantised if is_quantised else _attend,
        view=functools.partial(dequantised, scales_layout="columns") if is_quantised else as_it_is,
        tolerance=None if is_timed and sum(lengths) > 1 << 18 else tolerance,
        num_bytes=num_bytes if is_timed else 0,
        flops=4 * sum(lengths) * num_tokens * num_heads * HEAD_DIM,
        goal=GOALS[storage] if is_timed and is_plain and is_full and (len(lengths), lengths[0]) == (64, 8192) else None,
        peers=peers,
        tuned=("mfa_decode",)
        if is_timed and is_plain and (len(lengths), lengths[0]) in ((64, 8192), (8, 32_768), (1, 32_768))
        else (),
    )


def _planned(case: Case, storage: Storage) -> Case:
    """The same with the plan among the inputs, so that its small kernels are not in the time."""

    def make(seed: int) -> Inputs:
        queries, cached = case.make(seed)
        num_tokens, num_heads = queries.shape[1:3]
        plan = plan_decode(
            cached.lengths, tokens=num_tokens, heads=num_heads, storage=storage, max_tokens=cached.max_tokens
        )
        return queries, cached, plan

    peers = {name: peer for name, peer in case.peers.items() if name == "apart"}
    return dataclasses.replace(case, name=f"{case.name}/planned", make=make, peers=peers, tuned=())


def _attend(
    queries: jax.Array, cached: CachedTokens, plan: Plan | None = None, *, implementation: Implementation
) -> jax.Array:
    return mfa_decode(queries, cached, plan=plan, out_dtype=jnp.bfloat16, implementation=implementation)


def _attend_quantised(
    queries: jax.Array, cached: CachedTokens, plan: Plan | None = None, *, implementation: Implementation
) -> tuple[jax.Array, jax.Array]:
    return mfa_decode_quantised(queries, cached, plan=plan, implementation=implementation)


def _attend_then_quantise(queries: jax.Array, cached: CachedTokens, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The same in two steps: the kernel's heads, quantised by XLA."""
    heads = _attend(queries, cached, plan, implementation="auto")
    return quantise_rows(heads.reshape(heads.shape[0] * heads.shape[1], -1), scales_layout="columns")


def _decode_inputs(
    storage: Storage,
    lengths: tuple[int, ...],
    num_tokens: int,
    num_heads: int,
    query_dtype: jax.typing.DTypeLike,
    seed: int,
) -> Inputs:
    """Queries and the cache; what no sequence owns, rows past an end included, is NaN."""
    keys = jax.random.split(jax.random.key(seed), 3)
    pages, table = paged(storage, lengths, seed)
    queries = normal(keys[0], (len(lengths), num_tokens, num_heads, HEAD_DIM))
    return queries.astype(query_dtype), CachedTokens(pages, table, jnp.asarray(lengths, jnp.int32))


def paged(storage: str, lengths: tuple[int, ...], seed: int) -> tuple[kv_pages.KVPages, jax.Array]:
    """Pages in random order with two spare ones, and the table. Poisoned wherever no token lives."""
    random = np.random.default_rng(seed)
    needed = [-(-length // PAGE) for length in lengths]
    num_pages = sum(needed) + 2
    order = random.permutation(num_pages)[: sum(needed)]
    table = np.full((len(lengths), max(*needed, 1)), num_pages - 1, np.int32)
    owned = np.zeros((num_pages, PAGE), bool)
    start = 0
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        table[row, :count] = order[start : start + count]
        owned[table[row, :count]] = (np.arange(count * PAGE) < length).reshape(count, PAGE)
        start += count
    spare = np.flatnonzero(~owned.any(1))
    for row, count in enumerate(needed):
        table[row, count:] = spare[0]
    keys = jax.random.split(jax.random.key(seed), 2)
    return _poisoned_pages(keys, jnp.asarray(owned), storage), jnp.asarray(table)


@functools.partial(jax.jit, static_argnums=2)
def _poisoned_pages(keys: jax.Array, owned: jax.Array, storage: str) -> kv_pages.KVPages:
    def part(key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        def rows(one: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            return kv_pages.encode_rows(jax.random.normal(one, (PAGE, HEAD_DIM), jnp.bfloat16), storage)

        # In turns of 256 pages: the float32 numbers of all would be larger than the cache itself.
        stored, scales = jax.lax.map(rows, jax.random.split(key, owned.shape[0]), batch_size=256)
        if stored.dtype != jnp.uint8:
            stored = jnp.where(owned[..., None], stored, jnp.nan).astype(stored.dtype)
        if scales is None:
            return stored, None
        scales = jnp.where(owned[..., None], scales, jnp.nan).astype(scales.dtype)
        return stored, jnp.swapaxes(scales, 1, 2)

    (stored_keys, key_scales), (stored_values, value_scales) = part(keys[0]), part(keys[1])
    return kv_pages.KVPages(stored_keys, stored_values, key_scales, value_scales)


def _contiguous(queries: jax.Array, cached: CachedTokens, *_: object) -> tuple[jax.Array, ...]:
    """The pages as [B, S, 1, K]; in the order in which they lie, the time is the same."""
    batch, used = cached.table.shape[0], cached.table.size
    pages = cached.pages
    keys, values = (part[:used].reshape(batch, -1, 1, HEAD_DIM) for part in (pages.keys, pages.values))
    return queries, keys, values, cached.lengths


def _cudnn_decode(queries: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
        queries, keys, values, key_value_seq_lengths=lengths, implementation="cudnn", scale=HEAD_DIM**-0.5
    )


def prefill_cases(*, is_small: bool) -> list[Case]:
    """Correctness over packed ragged chunks, then times of whole prompts and of a chunk after a long prefix."""
    packs = ((3, 70), (0, 0), (65, 65)) if is_small else ((1, 1), (0, 0), (63, 4000), (700, 700), (129, 65_536))
    cases = [
        _prefill(f"mfa_prefill/{storage}/edges", storage, packs, padding=5)
        for storage in (("bfloat16",) if is_small else ("bfloat16", "fp8"))
    ]
    cases.append(_dense("dense_attention/edges", 1, 70 if is_small else 1300, 2 if is_small else 16, 112, False))
    if is_small:
        return cases
    for storage in ("bfloat16", "fp8"):
        for name, pack in (
            ("1k", ((1024, 1024),)),
            ("8k", ((8192, 8192),)),
            ("32k", ((32_768, 32_768),)),
            ("2k-behind-62k", ((2048, 65_536),)),
        ):
            if (storage, name) == ("fp8", "32k"):
                continue
            cases.append(_prefill(f"mfa_prefill/{storage}/{name}", storage, pack, is_timed=True))
    cases.append(_dense("dense_attention/vision/4x2708", 4, 2708, 16, 112, True))
    return cases


def _prefill(
    name: str, storage: str, packs: tuple[tuple[int, int], ...], *, padding: int = 0, is_timed: bool = False
) -> Case:
    """`packs` are (new tokens, cached tokens) of each sequence."""
    seen = sum(new * (2 * cached - new + 1) // 2 for new, cached in packs)
    rows = sum(new for new, _ in packs)
    num_bytes = 4 * rows * NUM_HEADS * HEAD_DIM
    num_bytes += sum(cached for _, cached in packs) * bytes_per_token(HEAD_DIM, storage)
    return Case(
        name=name,
        kernel="mfa_prefill",
        make=functools.partial(_prefill_inputs, storage, packs, padding),
        run=mfa_prefill,
        tolerance=None if is_timed and rows > 2048 else TOLERANCE[storage],
        num_bytes=num_bytes if is_timed else 0,
        flops=4 * seen * NUM_HEADS * HEAD_DIM,
        goal=0.65 if name.endswith("bfloat16/8k") else None,
        peers={"cudnn": Peer(_cudnn_prefill, _contiguous)}
        if is_timed and storage == "bfloat16" and packs[0][0] == packs[0][1]
        else {},
        tuned=("mfa_prefill",) if name.endswith("/8k") else (),
    )


def _prefill_inputs(storage: str, packs: tuple[tuple[int, int], ...], padding: int, seed: int) -> Inputs:
    starts = np.concatenate([[0], np.cumsum([new for new, _ in packs])]).astype(np.int32)
    lengths = tuple(cached for _, cached in packs)
    pages, table = paged(storage, lengths, seed)
    queries = normal(jax.random.key(seed + 1), (int(starts[-1]) + padding, NUM_HEADS, HEAD_DIM))
    queries = queries.at[int(starts[-1]) :].set(jnp.nan)
    return queries, CachedTokens(pages, table, jnp.asarray(lengths, jnp.int32)), jnp.asarray(starts)


def _cudnn_prefill(queries: jax.Array, keys: jax.Array, values: jax.Array, _: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
        queries[None], keys, values, is_causal=True, implementation="cudnn", scale=HEAD_DIM**-0.5
    )[0]


def _dense(name: str, batch: int, length: int, num_heads: int, head_dim: int, is_timed: bool) -> Case:
    def make(seed: int) -> Inputs:
        keys = jax.random.split(jax.random.key(seed), 3)
        return tuple(normal(key, (batch, length, num_heads, head_dim)) for key in keys)

    def cudnn(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(queries, keys, values, implementation="cudnn", scale=head_dim**-0.5)

    return Case(
        name=name,
        kernel="mfa_prefill",
        make=make,
        run=dense_attention,
        tolerance=TOLERANCE["bfloat16"],
        num_bytes=8 * batch * length * num_heads * head_dim if is_timed else 0,
        flops=4 * batch * length * length * num_heads * head_dim,
        goal=0.60 if is_timed else None,
        peers={"cudnn": Peer(cudnn)} if is_timed else {},
        tuned=("dense_attention",) if is_timed else (),
    )
