"""The table of sizes: how many programs an engine has, and what fits where."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.engine.bucket_table import BucketTable, fit, power_of_two, split_images
from step3_jax.engine.config import EngineConfig
from step3_jax.text.image_settings import ImageSettings

MAX_PROGRAMS = 24


def table_of(name: str, images: ImageSettings, num_shards: int) -> BucketTable:
    max_pages = math.ceil(ModelConfig.preset(name).text.max_position_embeddings / 64)
    sizes = images.image_size, images.window_size
    return BucketTable.of(
        EngineConfig(), max_pages=max_pages, num_shards=num_shards, num_image_shards=num_shards, image_sizes=sizes
    )


def test_devices_that_encode_an_image_together_are_not_given_one_each() -> None:
    table = BucketTable.of(EngineConfig(), max_pages=4, num_shards=8, num_image_shards=1, image_sizes=(64,))
    assert table.images == (1, 4)


@pytest.mark.parametrize("num_shards", [1, 8])
@pytest.mark.parametrize("name", ["step3-tiny", "step3"])
def test_the_defaults_have_few_programs(name: str, num_shards: int) -> None:
    images = ImageSettings.load(resources.find("models/step3-tiny")) if name == "step3-tiny" else ImageSettings()
    table = table_of(name, images, num_shards)
    assert table.max_pages == {"step3-tiny": 32, "step3": 1024}[name]
    programs = table.programs()
    assert len(set(programs)) == len(programs) <= MAX_PROGRAMS
    assert table.max_num_seqs * num_shards == 32
    assert table.max_num_batched_tokens * num_shards == 4096
    assert len({type(program) for program in programs}) == 4


def test_text_only_models_have_no_programs_for_images() -> None:
    table = BucketTable.of(EngineConfig(max_num_seqs=3, max_num_batched_tokens=100), max_pages=4)
    names = [type(program).__name__ for program in table.programs()]
    assert names == ["PrefillProgram"] * 3 + ["DecodeProgram"] * 2 + ["CopyProgram"]
    assert (table.chunks, table.seqs) == ((32, 64, 100), (1, 2))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_every_chunk_has_a_size_of_less_than_twice_its_tokens(largest: int, num_tokens: int) -> None:
    table = BucketTable.of(EngineConfig(max_num_batched_tokens=largest), max_pages=4, image_sizes=(64,))
    num_tokens = min(num_tokens, largest)
    for has_images, least in ((False, 32), (True, 256)):
        size = table.fit_chunk(num_tokens, has_images=has_images)
        assert num_tokens <= size <= max(least, 2 * num_tokens - 1)
        assert any(getattr(program, "num_tokens", 0) == size for program in table.programs())


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="301 is given, and at most 300 is allowed"):
        fit(301, (64, 128, 300))


@given(st.integers(0, 70), st.integers(1, 8))
def test_images_go_into_calls_with_few_empty_places(count: int, num_shards: int) -> None:
    sizes = (num_shards, 4 * num_shards)
    parts = split_images(count, sizes)
    assert sum(parts) == count
    assert all(0 < part <= sizes[-1] for part in parts)
    assert sum(fit(part, sizes) for part in parts) - count < 2 * num_shards


def test_powers_of_two() -> None:
    assert [power_of_two(size) for size in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]
