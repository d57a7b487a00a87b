"""Pictures for loggers, as arrays: the samples of a task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.task import AnySplit

COUNT = 25


def image_grid(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Return images side by side in a grid as square as can be, row by row, one white pixel between them.

    Args:
        images: `[N, H, W, C]` with 1 or 3 channels; uint8, or numbers that are stretched from their least to
            their greatest.

    Returns:
        uint8 `[H', W', 3]`.

    Raises:
        ValueError: images of another shape, or none.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [N, H, W, 1] or [N, H, W, 3] with N >= 1, got {list(images.shape)}")
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        images = ((images - low) * (255 / (high - low or 1))).astype(np.uint8)
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        grid[top : top + height, left : left + width] = image  # one channel is repeated
    return grid


def sample_images(split: AnySplit) -> NDArray[np.uint8]:
    """Return a grid `[H', W', 3]` of up to 25 samples, evenly spaced over the split."""
    chosen = np.unique(np.linspace(0, len(split) - 1, COUNT).astype(np.int64))
    return image_grid(split.take(chosen).x)
