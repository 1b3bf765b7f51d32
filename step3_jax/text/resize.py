"""Float bilinear resize with antialias, as `torchvision` does it for tensors (`align_corners` off)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The source samples of each new sample along one axis, and their weights.

    A triangle filter, as wide as one source sample when the axis grows and as one new sample when it shrinks;
    at the borders the weights that remain are scaled to sum to one (PyTorch, `upsample_bilinear2d_aa`).

    Args:
      size: Samples along the axis.
      new_size: New number of samples.

    Returns:
      Indices, int [new_size, taps], and weights, float32 [new_size, taps]; unused taps have weight 0.
    """
    # Positions in float32, as there: in float64 the pixels of large images differ by up to 5e-5.
    scale = np.float32(size / new_size)
    reach = np.float32(max(size / new_size, 1.0))
    center = scale * np.arange(0.5, new_size, dtype=np.float32)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + reach + 0.5).astype(np.int64), size)
    index = first[:, None] + np.arange((stop - first).max())
    weights = np.maximum(1.0 - np.abs(index + 0.5 - center[:, None]) / reach, 0.0) * (index < stop[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return np.minimum(index, size - 1), weights.astype(np.float32)


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image; values are neither rounded nor clipped.

    Args:
      pixels: uint8 or float32 [H, W, channels].
      height: New height in pixels.
      width: New width in pixels.

    Returns:
      float32 [height, width, channels], in the range of `pixels`.
    """
    result = pixels
    if result.shape[0] != height:
        # One pass per tap over whole rows: the matrix of weights has about 2 * ratio nonzero entries per
        # row.
        index, weights = _taps(result.shape[0], height)
        result = sum(result[index[:, tap]] * weights[:, tap, None, None] for tap in range(index.shape[1]))
    if result.shape[1] != width:
        index, weights = _taps(result.shape[1], width)
        result = sum(result[:, index[:, tap]] * weights[:, tap, None] for tap in range(index.shape[1]))
    return np.asarray(result, dtype=np.float32)
