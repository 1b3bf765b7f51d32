"""Bytes of the KV cache."""

from __future__ import annotations

import dataclasses

import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.page import KV_CACHE_DTYPES, count_pages, kv_bytes_per_token, page_bytes, pages_for

STEP3 = ModelConfig.preset("step3").text
# Keys and values of 256 in 61 layers; FP8 has a float32 scale per row, INT4 a bfloat16 one per 64 columns.
PUBLISHED = {"float32": 124_928, "bfloat16": 62_464, "fp8": 31_720, "int4": 16_592}


def test_a_token_of_the_released_model() -> None:
    assert {dtype: kv_bytes_per_token(STEP3, dtype) for dtype in KV_CACHE_DTYPES} == PUBLISHED


def test_a_sequence_takes_whole_pages() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache int4: .*multiple of 64; it is 96"):
        kv_bytes_per_token(dataclasses.replace(STEP3, head_dim=96), "int4")
    with pytest.raises(ValueError, match="kv_cache is 'fp4'; allowed: float32, bfloat16, fp8, int4"):
        kv_bytes_per_token(STEP3, "fp4")


def test_capacity_is_what_the_sequences_need_or_the_memory_holds() -> None:
    size = page_bytes(STEP3, "fp8")
    sizes = {"max_model_len": 130, "max_num_seqs": 4}
    assert count_pages(STEP3, "fp8", **sizes, memory_bytes=None) == 12
    assert count_pages(STEP3, "fp8", **sizes, memory_bytes=100 * size) == 12
    assert count_pages(STEP3, "fp8", **sizes, memory_bytes=7 * size + 1) == 7
    with pytest.raises(ValueError, match=r"max_model_len = 130 .* in fp8: lower max_model_len"):
        count_pages(STEP3, "fp8", **sizes, memory_bytes=3 * size - 1)
