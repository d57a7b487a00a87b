"""Convolutional networks, written from the definitions of their layers in float64 NumPy.

conv    y[n, i, j, o] = b[o] + sum_{u, v, c} x[n, s i + u - p, s j + v - p, c] K[u, v, c, o], 0 outside x
pool    y[n, i, j, c] = max_{u, v in 0, 1} x[n, 2 i + u, 2 j + v, c]
batch   y = (x - m) / sqrt(v + 1e-5) * scale + bias, m the mean and v the variance of x, per channel
        running m <- 0.9 m + 0.1 mean, v <- 0.9 v + 0.1 sum (x - m)^2 / (n - 1), used in evaluation
group   the same, with the mean over the pixels and channels of one group of one image
gelu    x Phi(x), Phi the distribution function of the standard normal
block   relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), shortcut x or norm(conv(x)) with 1x1 kernels
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import ndtr

from sequel_core.stream.arrays import FloatArray
from tests.reference.network import Weights

ACTIVATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "gelu": lambda x: x * ndtr(x),
}


def convolution(x: FloatArray, kernel: FloatArray, stride: int, padding: int) -> FloatArray:
    """Return maps `[N, H', W', out]` of maps `[N, H, W, in]` and a kernel `[h, w, in, out]`."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.asarray(np.einsum("nijcuv,uvco->nijo", windows, kernel))


def max_pool(x: FloatArray) -> FloatArray:
    """Return the maxima over 2x2 pixels; an odd last row or column is dropped."""
    return np.asarray(sliding_window_view(x, (2, 2), axis=(1, 2))[:, ::2, ::2].max((-2, -1)))


def group_norm(x: FloatArray, scale: FloatArray, bias: FloatArray, groups: int) -> FloatArray:
    """Return maps `[N, H, W, C]`, normalised over each group of channels of each image."""
    parts = x.reshape(*x.shape[:3], groups, -1)
    mean = parts.mean((1, 2, 4), keepdims=True)
    var = ((parts - mean) ** 2).mean((1, 2, 4), keepdims=True)
    normalised: FloatArray = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    return normalised * scale + bias


class Network:
    """The forward pass of a network with given weights, layer by layer.

    Args:
        weights: the weights in the canonical layout, including running statistics.
        norm: none, batch or group.
        groups: the number of groups of group normalisation.
        train: whether batch normalisation uses the statistics of the batch.
    """

    def __init__(self, weights: Weights, norm: str, groups: int, train: bool) -> None:
        self.weights, self.norm, self.groups, self.train = weights, norm, groups, train
        self.statistics: Weights = {}  # updated running statistics

    def conv(self, name: str, x: FloatArray, stride: int) -> FloatArray:
        """Return the outputs of a convolution with padding of half the kernel size."""
        kernel = self.weights[f"{name}/kernel"]
        return convolution(x, kernel, stride, len(kernel) // 2) + self.weights.get(f"{name}/bias", 0.0)

    def normalised(self, name: str, x: FloatArray) -> FloatArray:
        """Return the outputs of a normalisation layer."""
        scale, bias = self.weights[f"{name}/scale"], self.weights[f"{name}/bias"]
        if self.norm == "group":
            return group_norm(x, scale, bias, self.groups)
        mean, var = self.weights[f"{name}/mean"], self.weights[f"{name}/var"]
        if self.train:
            values = x.reshape(-1, x.shape[-1])
            for key, old, new in (("mean", mean, values.mean(0)), ("var", var, values.var(0, ddof=1))):
                self.statistics[f"{name}/{key}"] = 0.9 * old + 0.1 * new
            mean, var = values.mean(0), values.var(0)
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def dense(self, name: str, x: FloatArray) -> FloatArray:
        """Return the outputs of a dense layer for vectors `[N, in]`; 10 times the cosines without a bias."""
        kernel = self.weights[f"{name}/kernel"]
        if f"{name}/bias" in self.weights:
            return x @ kernel + self.weights[f"{name}/bias"]
        lengths = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(kernel, axis=0)
        return np.asarray(10 * (x @ kernel) / lengths)

    def cnn(self, x: FloatArray, activation: str, stride: int, pool: bool) -> FloatArray:
        """Return the logits `[N, num_classes]` of a CNN for images `[N, H, W, C]`."""
        f, names = ACTIVATIONS[activation], {path.split("/")[0] for path in self.weights}
        for i in range(sum(name.startswith("conv_") for name in names)):
            x = self.conv(f"conv_{i}", x, stride)
            x = f(x if self.norm == "none" else self.normalised(f"norm_{i}", x))
            x = max_pool(x) if pool else x
        x = x.reshape(len(x), -1)
        for i in range(sum(name.startswith("dense_") for name in names)):
            x = f(self.dense(f"dense_{i}", x))
        return self.dense("head", x)

    def resnet(self, x: FloatArray) -> FloatArray:
        """Return the logits `[N, num_classes]` of ResNet-18 for images `[N, H, W, C]`."""
        relu = ACTIVATIONS["relu"]
        x = relu(self.normalised("norm_0", self.conv("conv_0", x, 1)))
        for stage, stride in enumerate((1, 2, 2, 2)):
            for block, step in enumerate((stride, 1)):
                name = f"stage_{stage}_block_{block}"
                h = relu(self.normalised(f"{name}/norm_0", self.conv(f"{name}/conv_0", x, step)))
                h = self.normalised(f"{name}/norm_1", self.conv(f"{name}/conv_1", h, 1))
                if step == 2:
                    x = self.normalised(f"{name}/shortcut_norm", self.conv(f"{name}/shortcut_conv", x, 2))
                x = relu(h + x)
        return self.dense("head", x.mean((1, 2)))
