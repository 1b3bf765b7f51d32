"""Formats and memory of the paged cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from step3_jax.cache.paged import choose_storage, count_pages, empty_cache
from step3_jax.config import TextConfig
from step3_jax.layout.page import page_bytes

CONFIG = TextConfig(num_hidden_layers=3, head_dim=64, moe_layers=())
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "fp8", "int4"])
@pytest.mark.parametrize("as_bits", [False, True])
def test_memory_is_that_of_the_arrays(storage: str, as_bits: bool) -> None:
    cache = empty_cache(CONFIG, 5, storage, as_bits=as_bits)
    assert count_pages(cache, 3) == 5
    leaves = jax.tree.leaves(cache)
    assert sum(leaf.nbytes for leaf in leaves) == 5 * page_bytes(CONFIG, storage)
    # None twice, or they could not be given away.
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_auto_is_the_format_of_the_activations() -> None:
    assert choose_storage("auto", FLOAT32, 64) == "float32"
    assert choose_storage("auto", BFLOAT16, 64) == "bfloat16"
    assert choose_storage("int4", BFLOAT16, 64) == "int4"


def test_what_no_cache_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp16'; allowed: auto, float32, bfloat16, fp8, int4"):
        choose_storage("fp16", FLOAT32, 64)
    with pytest.raises(ValueError, match=r"'int4': .* multiple of 64; it is 32; give fp8 or bfloat16"):
        choose_storage("int4", FLOAT32, 32)
