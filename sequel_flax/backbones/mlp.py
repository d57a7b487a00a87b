"""Multi-layer perceptron. Mirror: sequel_lightning/backbones/mlp.py."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Hidden layers of ReLU units, each followed by dropout, and a linear head.

    Args:
        widths: units of each hidden layer.
        num_classes: outputs.
        dropout: probability that a hidden unit is dropped, in [0, 1).
    """

    widths: Sequence[int] = (256, 256)
    num_classes: int = 10
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[B, num_classes]` of images `[B, H, W, C]`."""
        x = x.reshape((x.shape[0], -1))
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)
