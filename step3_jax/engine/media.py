"""The pictures of prompts: encoded once each, and where their features go."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from step3_jax.cache.bucket import power_of_two
from step3_jax.engine.executor import Executor
from step3_jax.engine.job import Job
from step3_jax.engine.request import Prompt
from step3_jax.engine.scheduler import Chunk

# Views or windows in one call of the tower, for each shard; more would only take more memory, as one fills a device.
MAX_IMAGES_PER_CALL = 4
MIN_FEATURE_ROWS = 64


def chunk_features(
    executor: Executor, chunks: Sequence[Chunk]
) -> tuple[Float[Array, "M D"] | None, list[Int[np.ndarray, " count"]]]:
    """Image features for a chunk, encoded when a chunk first has a place of a prompt's pictures, and kept by its job.

    Args:
      executor: Runs the tower.
      chunks: What is read.

    Returns:
      Features (None if no picture has a place in the chunk), and for each of `chunks` the row of them that each of its
      tokens takes, -1 for none.
    """
    jobs = list({id(chunk.row.job): chunk.row.job for chunk in chunks if _has_places(chunk)}.values())
    if not jobs:
        return None, [np.full((chunk.num_tokens,), -1, np.int32) for chunk in chunks]
    _encode_jobs(executor, [job for job in jobs if job.features is None])
    arrays = {id(job.features): job.features for job in jobs if job.features is not None}
    ends = np.cumsum([array.shape[0] for array in arrays.values()])
    first = dict(zip(arrays, [0, *ends[:-1].tolist()], strict=True))
    rows = []
    for chunk in chunks:
        job, own = chunk.row.job, np.full((chunk.num_tokens,), -1, np.int32)
        if _has_places(chunk) and job.feature_rows is not None:
            own = job.feature_rows[chunk.start : chunk.start + chunk.num_tokens]
            own = np.where(own >= 0, own + first[id(job.features)], own).astype(np.int32)
        rows.append(own)
    features = _fill_up(list(arrays.values())) if len(arrays) > 1 else next(iter(arrays.values()))
    return features, rows


def _has_places(chunk: Chunk) -> bool:
    """Whether a picture's place is among the chunk's tokens."""
    return any(chunk.start <= place < chunk.start + chunk.num_tokens for place in chunk.row.prompt.image_places)


def _encode_jobs(executor: Executor, jobs: Sequence[Job]) -> None:
    """Sets the features of jobs that have none; those encoded together share one array."""
    if not jobs:
        return
    features, rows_of_prompt = encode_prompt_images(executor, [job.request.prompt for job in jobs])
    for job, rows in zip(jobs, rows_of_prompt, strict=True):
        prompt = job.request.prompt
        job.features, job.feature_rows = features, np.full((len(prompt.token_ids),), -1, np.int32)
        job.feature_rows[list(prompt.image_places)] = rows


def _fill_up(parts: Sequence[Float[Array, "_ D"]]) -> Float[Array, "M D"]:
    """Features one under the other, filled up to a power of two, so that few numbers of pictures make programs."""
    features = jnp.concatenate(parts)
    num_rows = max(MIN_FEATURE_ROWS, power_of_two(features.shape[0]))
    return jnp.pad(features, ((0, num_rows - features.shape[0]), (0, 0)))


def encode_prompt_images(
    executor: Executor, prompts: Sequence[Prompt]
) -> tuple[Float[Array, "M D"] | None, list[Int[np.ndarray, " places"]]]:
    """Encodes all pictures of some prompts.

    Args:
      executor: Runs the tower.
      prompts: The prompts; a picture that is there twice is encoded once.

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
    none = np.zeros((0,), np.int32)
    return _fill_up(parts), [
        np.concatenate([none, *(rows[id(image)] for image in prompt.images)]) for prompt in prompts
    ]


def _encode(executor: Executor, pixels: Sequence[np.ndarray], parts: list[Array]) -> list[Int[np.ndarray, " tokens"]]:
    """Adds the features of squares of one size to `parts`; returns the rows of each square in their concatenation."""
    rows: list[np.ndarray] = []
    most = MAX_IMAGES_PER_CALL * executor.num_shards
    for start in range(0, len(pixels), most):
        chunk = pixels[start : start + most]
        stacked = np.zeros((power_of_two(len(chunk)), *chunk[0].shape), np.float32)
        stacked[: len(chunk)] = chunk
        features = executor.encode_images(stacked)
        first, num_tokens = sum(part.shape[0] for part in parts), features.shape[1]
        parts.append(features.reshape(-1, features.shape[-1]))
        rows += [
            np.arange(first + index * num_tokens, first + (index + 1) * num_tokens, dtype=np.int32)
            for index in range(len(chunk))
        ]
    return rows
