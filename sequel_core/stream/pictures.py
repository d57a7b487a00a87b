"""Grids of sample images, for loggers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.task import AnySplit
from sequel_core.stream.trees import is_image

COUNT = 25


def image_grid(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the images in a nearly square grid, row by row, separated by one white pixel.

    Args:
        images: `[N, H, W, C]` with 1 or 3 channels; uint8, or other numbers, which are scaled to the full
            range.

    Returns:
        uint8 `[H', W', 3]`.

    Raises:
        ValueError: the images have another shape, or there are none.

    Example:
        >>> image_grid(np.zeros((4, 8, 8, 1), np.uint8)).shape
        (17, 17, 3)
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
        grid[top : top + height, left : left + width] = image  # broadcasts one channel to three
    return grid


def sample_images(split: AnySplit) -> NDArray[np.uint8] | None:
    """Return a grid `[H', W', 3]` of up to 25 samples, evenly spaced over the split.

    Returns:
        The grid, or None if the samples are not images with one or three channels.
    """
    if not is_image(split.x_spec) or split.x_spec.shape[-1] not in (1, 3):
        return None
    chosen = np.unique(np.linspace(0, len(split) - 1, COUNT).astype(np.int64))
    return image_grid(split.take(chosen).x)
