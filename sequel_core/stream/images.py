"""Images: normalisation, augmentation and pixel maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.arrays import FloatArray, UInt8Array

BLOCK = 256
"""Images that a weighted pixel map works on at a time."""


@dataclass(frozen=True)
class Normalisation:
    """`(x / 255 - mean) / std` per channel, written as `x * scale + shift`.

    Both frameworks then do the same arithmetic.

    Args:
        mean: channel means of the inputs scaled to [0, 1].
        std: channel standard deviations of the same, > 0.
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
    """Random crops and mirror images of training samples, drawn anew whenever a sample is trained on.

    Args:
        padding: black pixels (0 in images that are not uint8) on each side, out of which an image of the old
            size is cut, >= 0; 0 for no crops.
        flip: whether half of the images are mirrored, left for right.
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
            for start in range(0, n, BLOCK):  # few enough images for their sums to stay in the cache
                block = pixels[start : start + BLOCK]
                total = np.take(block, sources[:, 0], axis=1) * weights[:, 0]
                for k in range(1, sources.shape[1]):
                    total += np.take(block, sources[:, k], axis=1) * weights[:, k]
                out[start : start + BLOCK] = np.rint(total).clip(0, 255)
        return out.reshape(images.shape)
