"""Image preprocessing: normalisation, augmentation and pixel maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.arrays import FloatArray, UInt8Array

BLOCK = 256
"""Number of images that a weighted pixel map processes at a time."""


@dataclass(frozen=True)
class Normalisation:
    """Normalisation of uint8 images per channel, `(x / 255 - mean) / std`.

    It is computed as `x * scale + shift`, so that both frameworks do the same arithmetic.

    Args:
        mean: channel means of the images scaled to [0, 1].
        std: channel standard deviations of the images scaled to [0, 1], > 0.

    Raises:
        ValueError: `mean` and `std` differ in length, or a standard deviation is not positive.

    Example:
        >>> Normalisation(mean=(0.5,), std=(0.25,)).shift.tolist()
        [-2.0]
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"normalisation needs a mean and a std per channel, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"normalisation std must be > 0, got {self.std}")

    @property
    def scale(self) -> FloatArray:
        """Factor of a uint8 image, `1 / (255 std)`, shape `[C]`."""
        return 1.0 / (255.0 * np.asarray(self.std, np.float64))

    @property
    def shift(self) -> FloatArray:
        """Offset of a uint8 image, `-mean / std`, shape `[C]`."""
        return -np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)


@dataclass(frozen=True)
class Augmentation:
    """Random crops and horizontal flips of training samples, drawn each time a sample is trained on.

    Args:
        padding: pixels of value 0 added on each side before a crop of the original size, >= 0; 0 for no
            crops.
        flip: flip an image horizontally with probability 1/2.

    Raises:
        ValueError: `padding` is negative.

    Example:
        >>> bool(Augmentation(padding=4, flip=True)), bool(Augmentation())
        (True, False)
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"augmentation padding must be >= 0, got {self.padding}")

    def __bool__(self) -> bool:
        return bool(self.padding or self.flip)


@dataclass(frozen=True, eq=False)
class PixelMap:
    """A fixed linear map of pixels: `out[p] = sum_k weights[p, k] * in[indices[p, k]]`.

    A permutation or a nearest-neighbour rotation has one source per pixel and no weights; a bilinear rotation
    has four.

    Args:
        indices: source pixel (row-major) of each target pixel, int `[H * W, K]`; -1 reads a black pixel.
        weights: float `[H * W, K]`, or None for weights of one (then K must be 1).

    Raises:
        ValueError: `indices` and `weights` do not have these shapes.

    Example:
        >>> import numpy as np
        >>> swap = PixelMap(np.array([[1], [0]], np.int32))  # of images of 1 x 2 pixels
        >>> swap(np.array([3, 7], np.uint8).reshape(1, 1, 2, 1)).ravel().tolist()
        [7, 3]
    """

    indices: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.indices.ndim != 2:
            raise ValueError(f"pixel map indices must be [H * W, K], got shape {self.indices.shape}")
        if self.weights is None and self.indices.shape[1] != 1:
            raise ValueError(f"pixel map with {self.indices.shape[1]} sources per pixel needs weights")
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(
                f"pixel map weights have shape {self.weights.shape}, indices {self.indices.shape}"
            )

    def __call__(self, images: UInt8Array) -> UInt8Array:
        """Return the mapped images, uint8 `[N, H, W, C]`; weighted sums are rounded half to even."""
        n, height, width, channels = images.shape
        if height * width != len(self.indices):
            raise ValueError(
                f"pixel map is for {len(self.indices)} pixels, the images have {height} x {width}"
            )
        pixels = images.reshape(n, height * width, channels)
        black = self.indices < 0
        sources = np.where(black, 0, self.indices)
        if self.weights is None:
            out = np.take(pixels, sources[:, 0], axis=1)
            if black.any():
                out[:, black[:, 0]] = 0
        else:
            weights = np.where(black, np.float32(0), self.weights)[:, :, None]  # [H * W, K, 1]
            out = np.empty_like(pixels)
            for start in range(0, n, BLOCK):  # in blocks, so that the sums stay in the cache
                block = pixels[start : start + BLOCK]
                total = np.take(block, sources[:, 0], axis=1) * weights[:, 0]
                for k in range(1, sources.shape[1]):
                    total += np.take(block, sources[:, k], axis=1) * weights[:, k]
                out[start : start + BLOCK] = np.rint(total).clip(0, 255)
        return out.reshape(images.shape)
