"""Normalisation layers with the arithmetic of PyTorch, so that networks agree between the frameworks.

    y = (x - mean) / sqrt(var + 1e-5) * scale + bias, var the mean of (x - mean)^2 over n values
    batch: mean and var of a channel; running mean <- 0.9 running mean + 0.1 mean,
        running var <- 0.9 running var + 0.1 n/(n - 1) var
    group: mean and var of a group of channels of an image

This file has no twin, because PyTorch has these layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

EPSILON = 1e-5
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167) as in PyTorch.

    Its running variance is unbiased; that of linen's layer is biased.

    Example:
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, _ = BatchNorm().init_with_output(jax.random.key(0), x, use_running_average=False)
        >>> y.round(3).tolist()
        [[-1.0], [1.0]]
    """

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool, mask: jax.Array | None = None) -> jax.Array:
        """Normalise each channel.

        Args:
            x: Inputs `[N, ..., C]`.
            use_running_average: Whether to use the running statistics, which are then unchanged, instead of
                those of the batch.
            mask: The rows that count in the statistics of the batch, bool `[N]` or `[N, 1, ..., 1]`; None for
                all. The running statistics are unchanged if fewer than two values per channel count.

        Returns:
            All rows, normalised, with the shape of `x`.

        Raises:
            ValueError: The batch has one value per channel, and its statistics are needed.
        """
        channels, axes = x.shape[-1], tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            values = x.size // channels
            if values < 2 and not self.is_initializing():
                raise ValueError(
                    f"batch normalisation needs more than one value per channel to train on, got {x.shape}; "
                    "use batches of at least 2 samples or norm=group"
                )
            if mask is None:
                mean = x.mean(axes)
                var = jnp.square(x - _last(mean, x)).mean(axes)
                unbiased, some = var * (values / max(values - 1, 1)), None
            else:
                counted = mask.reshape(-1, *[1] * (x.ndim - 1))
                n = counted.sum(dtype=x.dtype) * (values // len(x))
                mean = jnp.where(counted, x, 0).sum(axes) / jnp.maximum(n, 1)
                var = jnp.square(jnp.where(counted, x - _last(mean, x), 0)).sum(axes) / jnp.maximum(n, 1)
                unbiased, some = var * (n / jnp.maximum(n - 1, 1)), n > 1
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    updated = ((1 - MOMENTUM) * running.value + MOMENTUM * new).astype(running.value.dtype)
                    running.value = updated if some is None else jnp.where(some, updated, running.value)
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        return x * _last(factor, x) + _last(bias - mean * factor, x)


def _last(values: jax.Array, x: jax.Array) -> jax.Array:
    """Return an array `[C]` with the number of axes of x."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def normalisation(norm: str, groups: int) -> nn.Module:
    """Return a normalisation layer; apply it with `normalised`.

    Args:
        norm: "batch" or "group".
        groups: Number of groups of group normalisation.

    Returns:
        The layer.

    Example:
        >>> type(normalisation("batch", 4)).__name__
        'BatchNorm'
    """
    if norm == "batch":
        return BatchNorm()
    return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False)


def normalised(layer: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """Apply a layer of `normalisation`.

    Args:
        layer: The layer.
        x: Inputs `[N, ..., C]`.
        train: Whether batch normalisation uses the statistics of the batch.

    Returns:
        The normalised inputs `[N, ..., C]`.

    Example:
        >>> x = jnp.zeros((2, 4))
        >>> layer = normalisation("group", 2)
        >>> normalised(layer.bind(layer.init(jax.random.key(0), x)), x, train=True).shape
        (2, 4)
    """
    out: jax.Array = layer(x, use_running_average=not train) if isinstance(layer, BatchNorm) else layer(x)
    return out
