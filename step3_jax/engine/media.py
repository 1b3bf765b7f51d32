"""Images of prompts: encoded once for the same pixels, and kept on the host while there is room."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from step3_jax.cache.bucket import power_of_two
from step3_jax.engine.executor import Executor
from step3_jax.engine.stats import EngineStats
from step3_jax.text.images import ProcessedImage

# Views or windows in one call of the tower, for each shard; more would only take more memory, as one fills a device.
MAX_IMAGES_PER_CALL = 4
CACHE_BYTES = 2**28


class FeatureCache:
    """Features of images by the digest of their pixels; the least recently used ones are dropped."""

    def __init__(self, executor: Executor, stats: EngineStats, max_bytes: int = CACHE_BYTES) -> None:
        """Takes what encodes.

        Args:
          executor: Runs the tower.
          stats: Counts images, and those that were known.
          max_bytes: Of all features that are kept.
        """
        self._executor = executor
        self._stats = stats
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: collections.OrderedDict[bytes, Float[np.ndarray, "tokens D"]] = collections.OrderedDict()

    def encode(self, images: Sequence[ProcessedImage]) -> Float[np.ndarray, "places D"]:
        """Features of a prompt's images in the order of their places: for each its windows, then its view."""
        found = {image.digest: self._features[image.digest] for image in images if image.digest in self._features}
        missing = list({image.digest: image for image in images if image.digest not in found}.values())
        self._stats.num_images += len(images)
        self._stats.num_known_images += len(images) - len(missing)
        start, compile_s = time.perf_counter(), self._executor.compile_s
        new = self._encode(missing)
        self._stats.image_encode_s += time.perf_counter() - start - (self._executor.compile_s - compile_s)
        for digest, features in new.items():
            self._features[digest] = features
            self._num_bytes += features.nbytes
        for image in images:
            self._features.move_to_end(image.digest)
        while self._num_bytes > self._max_bytes:
            _, dropped = self._features.popitem(last=False)
            self._num_bytes -= dropped.nbytes
        every = found | new
        return np.concatenate([every[image.digest] for image in images])

    def _encode(self, images: Sequence[ProcessedImage]) -> dict[bytes, Float[np.ndarray, "tokens D"]]:
        views = self._run([image.pixel_values for image in images])
        windows = iter(self._run([window for image in images for window in image.patch_pixel_values]))
        return {
            image.digest: np.concatenate([*(next(windows) for _ in range(image.plan.num_patches)), view])
            for image, view in zip(images, views, strict=True)
        }

    def _run(self, pixels: Sequence[Float[np.ndarray, "3 S S"]]) -> list[Float[np.ndarray, "tokens D"]]:
        """Features of squares of one size."""
        features: list[Float[np.ndarray, "tokens D"]] = []
        most = MAX_IMAGES_PER_CALL * self._executor.num_shards
        for part in _parts(pixels, most):
            stacked = np.zeros((power_of_two(len(part)), *part[0].shape), np.float32)
            stacked[: len(part)] = part
            features += list(self._executor.encode_images(stacked)[: len(part)])
        return features


def _parts(pixels: Sequence[Float[np.ndarray, "3 S S"]], most: int) -> Iterable[Sequence[Float[np.ndarray, "3 S S"]]]:
    return (pixels[start : start + most] for start in range(0, len(pixels), most))
