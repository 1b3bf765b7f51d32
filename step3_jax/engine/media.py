"""Images of prompts: equal pixels are encoded once, and their features kept on the host while there is room."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from step3_jax.engine.bucket_table import fit, split_images
from step3_jax.engine.executor import Executor
from step3_jax.engine.stats import EngineStats
from step3_jax.text.images import ProcessedImage

CACHE_BYTES = 2**28


class FeatureCache:
    """Image features by the digest of the pixels; the least recently used ones are dropped."""

    def __init__(
        self, executor: Executor, sizes: Sequence[int], stats: EngineStats, max_bytes: int = CACHE_BYTES
    ) -> None:
        """Takes the executor that encodes.

        Args:
          executor: Runs the tower.
          sizes: Numbers of squares that one call of it takes, see `BucketTable.images`.
          stats: Counts images, and those found here.
          max_bytes: The most bytes of features to keep.
        """
        self._executor = executor
        self._sizes = sizes
        self._stats = stats
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: collections.OrderedDict[bytes, Float[np.ndarray, "tokens D"]] = collections.OrderedDict()

    def encode(self, images: Sequence[ProcessedImage]) -> Float[np.ndarray, "places D"]:
        """Features of a prompt's images in the order of their places; for each image, its windows and then its view."""
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
        for count in split_images(len(pixels), self._sizes):
            part = pixels[len(features) : len(features) + count]
            stacked = np.zeros((fit(count, self._sizes), *part[0].shape), np.float32)
            stacked[:count] = part
            features += list(self._executor.encode_images(stacked)[:count])
        return features
