"""What the tiny model's pictures show, what is held out, and how larger ones are cut."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from step3_jax import resources
from step3_jax.text.images import ImageSettings, process
from tools.tiny.batches import NO_DIGIT, digit_places
from tools.tiny.canvas import digit_mask, paint_digit, paint_drawing, place_centred
from tools.tiny.drawings import THINGS, answer_for
from tools.tiny.pictures import SETTINGS, cut
from tools.tiny.sources import HELD_OUT_NUMBERS, held_out_numbers


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dog", "This is a dog."),
        ("apple", "This is an apple."),
        ("umbrella", "This is an umbrella."),
        ("scissors", "These are scissors."),
        ("grapes", "These are grapes."),
        ("bread", "This is bread."),
        ("palm tree", "This is a palm tree."),
    ],
)
def test_answers_have_the_right_article(name: str, answer: str) -> None:
    assert answer_for(name) == answer


def test_every_thing_has_an_answer_of_its_own() -> None:
    assert len(THINGS) == 80
    assert len({answer_for(name) for name, *_ in THINGS}) == 80


def test_held_out_numbers_are_always_the_same_and_never_single_digits() -> None:
    numbers = held_out_numbers()
    np.testing.assert_array_equal(numbers, held_out_numbers())
    assert len(set(numbers.tolist())) == sum(HELD_OUT_NUMBERS.values())
    lengths = np.array([len(str(number)) for number in numbers])
    assert {int(length): int(count) for length, count in zip(*np.unique(lengths, return_counts=True), strict=True)} == (
        HELD_OUT_NUMBERS
    )


def test_heads_learn_digits_from_the_left() -> None:
    places = digit_places(np.array([1, 2, 0]), np.array([407, 3, 12]))
    expected = [[4, 0, 7, NO_DIGIT], [3] + [NO_DIGIT] * 3, [NO_DIGIT] * 4]
    np.testing.assert_array_equal(places, expected)


def test_training_cuts_with_the_shipped_settings() -> None:
    shipped = ImageSettings.load(resources.find("models/step3-tiny"))
    for name in ("image_size", "window_size", "max_side", "small_ratio", "wide_ratio", "round_up"):
        assert getattr(shipped, name) == getattr(SETTINGS, name), name


@pytest.mark.parametrize("size", [(64, 64), (90, 90), (200, 200), (240, 100), (300, 90), (80, 61)])
def test_training_pictures_are_cut_as_at_inference(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    view, windows = cut(picture)
    expected = process(picture, SETTINGS)
    assert len(windows) == len(expected.patch_pixel_values)
    # Training resizes in bytes and rounds twice where inference keeps fractions: about one step of 255, over std 0.26.
    for ours, theirs in zip([view, *windows], [expected.pixel_values, *expected.patch_pixel_values], strict=True):
        pixels = np.asarray(ours, np.float32).transpose(2, 0, 1) / 255
        mean, std = (
            np.array(values, np.float32)[:, None, None] for values in (SETTINGS.image_mean, SETTINGS.image_std)
        )
        np.testing.assert_allclose((pixels - mean) / std, theirs, atol=1.05 / 255 / 0.26)


def test_a_painted_drawing_keeps_its_frame_and_follows_its_seed() -> None:
    drawing = Image.new("RGBA", (128, 128), (200, 30, 30, 255))
    first, again, other = (
        np.asarray(paint_drawing(drawing, (64, 48), 1.0, np.random.default_rng(seed))) for seed in (1, 1, 2)
    )
    assert first.shape == (48, 64, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_centred_drawing_stands_on_white() -> None:
    picture = np.asarray(place_centred(Image.new("RGBA", (32, 32), (0, 0, 0, 255)), 100))
    assert (picture[0] == 255).all()
    assert (picture[50, 50] == 0).all()


def test_a_digit_has_an_empty_rim() -> None:
    mask = np.asarray(digit_mask(np.full((8, 8), 16.0), 100))
    assert mask[0].max() < 60
    assert mask[50, 50] == 255
    painted = paint_digit(np.full((8, 8), 16.0), (64, 64), 1.0, np.random.default_rng(0))
    assert painted.size == (64, 64)
