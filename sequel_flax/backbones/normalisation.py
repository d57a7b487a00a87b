"""Normalisation with the arithmetic of torch's layers, for networks with the same numbers in both frameworks.

    y = (x - mean) / sqrt(var + 1e-5) * scale + bias, var the mean of (x - mean)^2 over n values
    batch: of a channel; running mean <- 0.9 running mean + 0.1 mean, running var alike with n/(n - 1) var
    group: of a group of channels of an image

It has no mirror: torch brings these layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

EPSILON = 1e-5
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) as torch has it.

    Its running variance is the unbiased one; linen's own layer keeps the biased.
    """

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool, mask: jax.Array | None = None) -> jax.Array:
        """Normalise each channel.

        Args:
            x: `[N, ..., C]`.
            use_running_average: by the running statistics, which stay as they are; else by the batch's.
            mask: bool, `[N]` or `[N, 1, ..., 1]`: the rows that count in the batch's statistics; None for
                all. With fewer than two values per channel the running statistics stay as they are.

        Returns:
            The shape of x; also rows that do not count are normalised.

        Raises:
            ValueError: statistics of one value per channel are asked for.
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
                    moved = ((1 - MOMENTUM) * running.value + MOMENTUM * new).astype(running.value.dtype)
                    running.value = moved if some is None else jnp.where(some, moved, running.value)
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        return x * _last(factor, x) + _last(bias - mean * factor, x)


def _last(values: jax.Array, x: jax.Array) -> jax.Array:
    """Return one value per channel `[C]` in as many axes as x."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def normalisation(norm: str, groups: int) -> nn.Module:
    """Return the layer that a network's settings name, `batch` or `group`; see `normalised`."""
    if norm == "batch":
        return BatchNorm()
    return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False)


def normalised(layer: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    """Return x `[N, ..., C]` as a layer of `normalisation` leaves it."""
    out: jax.Array = layer(x, use_running_average=not train) if isinstance(layer, BatchNorm) else layer(x)
    return out
