"""The pictures of a batch: encoded once each, and where their features go."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from step3_jax.engine.executor import Executor
from step3_jax.engine.request import Prompt

# Views or windows in one call of the tower; more would only take more memory, as one picture fills the device.
MAX_IMAGES_PER_CALL = 4
MIN_FEATURE_ROWS = 64


def encode_prompt_images(
    executor: Executor, prompts: Sequence[Prompt]
) -> tuple[Float[Array, "M D"] | None, list[Int[np.ndarray, " places"]]]:
    """Encodes all pictures of a batch.

    Args:
      executor: Runs the tower.
      prompts: The prompts of the batch; one that is there twice is encoded once.

    Returns:
      Features of all pictures, filled up to a power of two (None if there are no pictures), and for each prompt the
      rows of them that its image places take: for each picture its windows, then its view.
    """
    images = list({id(image): image for prompt in prompts for image in prompt.images}.values())
    if not images:
        return None, [np.zeros((0,), np.int32) for _ in prompts]
    views = [image.pixel_values for image in images]
    windows = [window for image in images for window in image.patch_pixel_values]
    parts: list[Array] = []
    view_rows = _encode(executor, views, parts)
    window_rows = _encode(executor, windows, parts)
    rows: dict[int, np.ndarray] = {}
    start = 0
    for image, view in zip(images, view_rows, strict=True):
        end = start + image.plan.num_patches
        rows[id(image)] = np.concatenate([*window_rows[start:end], view])
        start = end
    features = jnp.concatenate(parts)
    # A power of two, so that few numbers of pictures make programs of their own.
    num_rows = max(MIN_FEATURE_ROWS, 1 << (features.shape[0] - 1).bit_length())
    features = jnp.pad(features, ((0, num_rows - features.shape[0]), (0, 0)))
    none = np.zeros((0,), np.int32)
    return features, [np.concatenate([none, *(rows[id(image)] for image in prompt.images)]) for prompt in prompts]


def _encode(executor: Executor, pixels: Sequence[np.ndarray], parts: list[Array]) -> list[Int[np.ndarray, " tokens"]]:
    """Adds the features of squares of one size to `parts`; returns the rows of each square in their concatenation."""
    rows: list[np.ndarray] = []
    for start in range(0, len(pixels), MAX_IMAGES_PER_CALL):
        chunk = pixels[start : start + MAX_IMAGES_PER_CALL]
        stacked = np.zeros((1 << (len(chunk) - 1).bit_length(), *chunk[0].shape), np.float32)
        stacked[: len(chunk)] = chunk
        features = executor.encode_images(stacked)
        first, num_tokens = sum(part.shape[0] for part in parts), features.shape[1]
        parts.append(features.reshape(-1, features.shape[-1]))
        rows += [
            np.arange(first + index * num_tokens, first + (index + 1) * num_tokens, dtype=np.int32)
            for index in range(len(chunk))
        ]
    return rows
