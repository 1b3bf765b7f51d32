"""Image geometry, pixels and token layout against an independent processor's numbers."""

from __future__ import annotations

import json
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from step3_jax.text import images
from step3_jax.text.images import ImageSettings, ImageTokenIds

GOLDENS = Path(__file__).parents[2] / "goldens" / "processor"
LAYOUT = json.loads((GOLDENS / "layout.json").read_text())["rows"]
PROCESSOR = json.loads((GOLDENS / "processor.json").read_text())
IDS = PROCESSOR["special_token_ids_used_here"]
TOKENS = ImageTokenIds(**{name.strip("<>"): number for name, number in IDS.items()})


def _unroll(run_lengths):
    return list(chain.from_iterable(repeat(value, count) for value, count in run_lengths))


@pytest.mark.parametrize("row", LAYOUT, ids=lambda row: f"{row['w']}x{row['h']}")
def test_plan_equals_released_geometry(row):
    plan = images.plan(row["w"], row["h"])
    assert list(plan.padded) == row["padded"]
    assert list(plan.limited) == row["limited"]
    assert plan.window == row["window"]
    assert (None if plan.crop is None else list(plan.crop)) == row["crop"]
    assert (plan.num_patches, plan.num_newlines) == (row["num_patches"], row["num_newlines"])
    assert plan.num_tokens == row["tokens"] == len(plan.token_ids(TOKENS))
    windows = row["windows_xywh"] or []
    if isinstance(windows, dict):
        assert list(plan.windows[0]) == windows["first"]
        assert list(plan.windows[-1]) == windows["last"]
        assert plan.num_patches == windows["x_num"] * windows["y_num"]
    else:
        assert [list(window) for window in plan.windows] == windows


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (3024, 32, "95 windows; at most 64"),
        (30000, 40, "756 windows; at most 64"),
        (100000, 32, "no area after"),
        (60000, 1, "padded to a square with sides of 60000"),
        (0, 5, "at least 1"),
    ],
)
def test_plan_refuses_extreme_shapes_by_stated_limit(width, height, message):
    with pytest.raises(ValueError, match=message):
        images.plan(width, height)


def test_plan_refuses_too_many_tokens():
    with pytest.raises(ValueError, match="3164 tokens; at most 3000"):
        images.plan(3024, 3024, ImageSettings(max_tokens=3000))


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_plan_is_a_grid_with_newline_never_last(width, height):
    settings = ImageSettings()
    assume(max(width, height) <= 60 * min(width, height))
    plan = images.plan(width, height, settings)
    assert plan.num_tokens == len(plan.token_ids(TOKENS)) <= settings.max_tokens
    if plan.windows:
        columns = len({x for x, _, _, _ in plan.windows})
        rows = len({y for _, y, _, _ in plan.windows})
        assert columns * rows == plan.num_patches
        assert plan.num_newlines == rows - 1
        assert not plan.newline_mask[-1]


@pytest.mark.parametrize("index", range(len(PROCESSOR["images"])))
def test_process_equals_released_pixels(index):
    expected = PROCESSOR["images"][index]
    samples = np.load(GOLDENS / "processor.npz")
    with Image.open(GOLDENS / expected["file"]) as picture:
        result = images.process(picture.convert("RGB"))
    assert list(result.plan.limited) == expected["view_size_before_square_resize"]
    assert list(result.plan.newline_mask) == expected["patch_newline_mask"]
    assert result.plan.token_ids(TOKENS) == _unroll(expected["token_ids_rle"])
    assert result.pixel_values.dtype == result.patch_pixel_values.dtype == np.float32
    assert result.patch_pixel_values.shape == (expected["num_patches"], 3, 504, 504)

    np.testing.assert_allclose(result.pixel_values[:, 3::56, 5::56], samples[f"i{index}_pixel_grid"], atol=1e-5)
    np.testing.assert_allclose(result.pixel_values[:, 364], samples[f"i{index}_pixel_row"], atol=1e-5)
    if expected["num_patches"]:
        windows = result.patch_pixel_values
        np.testing.assert_allclose(windows[:, :, 3::56, 5::56], samples[f"i{index}_patch_grid"], atol=1e-5)
        np.testing.assert_allclose(windows[:, :, 252], samples[f"i{index}_patch_row"], atol=1e-5)
    for ours, numbers in zip(
        [result.pixel_values, *result.patch_pixel_values],
        [expected["pixel_values"], *expected["patch_pixel_values"]],
        strict=True,
    ):
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(ours, name)(axis=(1, 2)), numbers[name], atol=2e-4, err_msg=name)


def test_process_makes_what_lies_outside_a_short_crop_black():
    result = images.process(Image.new("RGB", (900, 300), "white"))
    settings = ImageSettings()
    black = -np.asarray(settings.image_mean) / np.asarray(settings.image_std)
    assert result.plan.crop == (1008, 300)
    np.testing.assert_allclose(result.patch_pixel_values[0, :, 303, 0], black, rtol=1e-5)
    assert (result.patch_pixel_values[0, :, 296, 0] > 1).all()


def test_process_follows_smaller_settings():
    settings = ImageSettings(image_size=64, window_size=48, max_side=192, image_token_len=16, patch_token_len=9)
    result = images.process(Image.new("RGB", (200, 100), "red"), settings)
    assert result.pixel_values.shape == (3, 64, 64)
    assert result.plan.limited == (192, 96)
    assert result.patch_pixel_values.shape == (8, 3, 48, 48)
    assert len(result.plan.token_ids(TOKENS)) == 8 * 11 + 1 + 18


def test_process_refuses_pictures_that_are_not_rgb():
    with pytest.raises(ValueError, match="mode L, not RGB"):
        images.process(Image.new("L", (64, 64)))


@pytest.mark.parametrize("prompt", PROCESSOR["prompts"], ids=lambda prompt: prompt["text"])
def test_expand_equals_released_prompts(prompt):
    pieces = prompt["text"].split("<im_patch>")
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        ids += [TOKENS.im_patch] * (number > 0)
        ids += [64 + ord(character) % 64 for character in piece]
    plans = []
    for name in prompt["images"]:
        with Image.open(GOLDENS / name) as picture:
            plans.append(images.plan(*picture.size))
    assert [plan.num_patches for plan in plans] == prompt["num_patches"]
    assert images.expand_image_tokens(ids, plans, TOKENS) == _unroll(prompt["input_ids_rle"])


@pytest.mark.parametrize(("num_places", "num_images"), [(0, 1), (1, 0), (2, 1)])
def test_expand_refuses_another_number_of_places_than_images(num_places, num_images):
    with pytest.raises(ValueError, match=rf"{num_places} <im_patch> token\(s\) for {num_images} image"):
        images.expand_image_tokens([5] + [TOKENS.im_patch] * num_places, [images.plan(64, 64)] * num_images, TOKENS)


def test_settings_load_takes_known_keys_and_ignores_others(tmp_path):
    assert ImageSettings.load(tmp_path) == ImageSettings()
    stored = {
        "image_size": 64,
        "patch_size": 48,
        "max_side": 200,
        "image_mean": [0.5, 0.5, 0.5],
        "do_resize": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    settings = ImageSettings.load(tmp_path)
    assert (settings.image_size, settings.window_size, settings.max_side) == (64, 48, 200)
    assert settings.image_mean == (0.5, 0.5, 0.5)
    assert settings.image_token_len == 169


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"patch_size": 0}', "window_size is 0"),
        ('{"image_size": "728"}', "image_size is '728'"),
        ('{"image_std": [1, 0, 1]}', "image_std is"),
        ('{"round_up": 1.5}', "round_up is 1.5"),
        ('{"image_token_len": true}', "image_token_len is True"),
        ('{"small_ratio": NaN}', "small_ratio is nan"),
        ("[1]", "JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_settings_load_refuses_impossible_values_by_name(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ImageSettings.load(tmp_path)
