"""Fixed pixel maps: permutations and rotations."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.images import PixelMap

Interpolation = Literal["nearest", "bilinear"]


def permutation(seed: int, task: int, num_pixels: int) -> PixelMap:
    """Return a task's uniform random permutation of pixels, the same for every channel.

    Args:
        seed: seed of the stream, >= 0.
        task: index of the task, from 0.
        num_pixels: number of pixels of an image, H * W.
    """
    order = plan.permutation(seed, "pixels", task, count=num_pixels)
    return PixelMap(order.astype(np.int32)[:, None])


def rotation(height: int, width: int, angle: float, interpolation: Interpolation = "bilinear") -> PixelMap:
    """Return the counter-clockwise rotation about the image's centre. Pixels from outside are black.

    This is the map that `torchvision.transforms.functional.rotate` applies to tensors. The output pixel
    (x, y), measured from the centre with y pointing down, reads the input at
    (x cos a - y sin a, x sin a + y cos a).

    Args:
        height: height of the images in pixels.
        width: width of the images in pixels.
        angle: the angle a in degrees.
        interpolation: `nearest` (one source per pixel) or `bilinear` (four sources per pixel).
    """
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    y, x = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    # Rounding makes quarter turns land exactly on pixels.
    column = np.round(x * cos - y * sin + (width - 1) / 2, 9).reshape(-1)
    row = np.round(x * sin + y * cos + (height - 1) / 2, 9).reshape(-1)

    def sources(rows: FloatArray, columns: FloatArray) -> NDArray[np.int32]:
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        return np.where(inside, rows * width + columns, -1).astype(np.int32)

    if interpolation == "nearest":
        return PixelMap(sources(np.rint(row), np.rint(column))[:, None])
    top, left = np.floor(row), np.floor(column)
    down, right = row - top, column - left
    corners = [
        (0, 0, (1 - down) * (1 - right)),
        (0, 1, (1 - down) * right),
        (1, 0, down * (1 - right)),
        (1, 1, down * right),
    ]
    return PixelMap(
        np.stack([sources(top + i, left + j) for i, j, _ in corners], axis=1),
        np.stack([weight for _, _, weight in corners], axis=1).astype(np.float32),
    )
