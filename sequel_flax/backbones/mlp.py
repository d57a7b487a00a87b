"""Multi-layer perceptron. Mirror: sequel_lightning/backbones/mlp.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sequel_flax.backbones.heads import CLASSIFIERS


class MLP(nn.Module):
    """Hidden dense layers with ReLU and dropout, and a linear head.

    Args:
        widths: Units of each hidden layer.
        num_classes: Number of outputs.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        classifier: The last layer, "linear" or "cosine".

    Example:
        >>> import jax.numpy as jnp
        >>> MLP(widths=(8,)).init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    widths: Sequence[int] = (256, 256)
    num_classes: int = 10
    dropout: float = 0.0
    classifier: str = "linear"

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        for i, width in enumerate(self.widths):
            setattr(self, f"dense_{i}", nn.Dense(width))
            setattr(self, f"Dropout_{i}", nn.Dropout(self.dropout))
        self.head = CLASSIFIERS[self.classifier](self.num_classes)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the last hidden layer `[B, D]` of images `[B, H, W, C]`, or of other arrays `[B, ...]`."""
        x = x.reshape((x.shape[0], -1))
        for i in range(len(self.widths)):
            x = nn.relu(getattr(self, f"dense_{i}")(x))
            x = getattr(self, f"Dropout_{i}")(x, deterministic=not train)
        return x

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return outputs `[B, num_classes]` of images `[B, H, W, C]`, or of other arrays `[B, ...]`."""
        logits: jax.Array = self.head(self.features(x, train))
        return logits


class TaskHeads(nn.Module):
    """A linear head for each task on a shared network; it takes the task of each sample.

    It needs an algorithm with `task_given=True`, or the task scenario.

    Args:
        trunk: The shared network, a module that returns features `[B, D]`.
        num_classes: Number of outputs of a head.
        num_tasks: Number of heads.

    Example:
        >>> net = TaskHeads(MLP(widths=(8,), num_classes=6), num_classes=10, num_tasks=3)
        >>> x, t = jnp.zeros((2, 8, 8, 1)), jnp.array([0, 2])
        >>> net.init_with_output(jax.random.key(0), x, t)[0].shape
        (2, 10)
    """

    trunk: nn.Module
    num_classes: int
    num_tasks: int

    def setup(self) -> None:
        """Create the heads, with the names of the Lightning network."""
        for k in range(self.num_tasks):
            setattr(self, f"head_{k}", nn.Dense(self.num_classes))

    def __call__(self, x: Any, t: jax.Array, train: bool = False) -> jax.Array:
        """Return outputs `[B, num_classes]` of inputs `[B, ...]` by the heads of their tasks t `[B]`."""
        trunk: Any = self.trunk
        features = trunk(x, train=train)
        outputs = jnp.stack([getattr(self, f"head_{k}")(features) for k in range(self.num_tasks)], axis=1)
        return outputs[jnp.arange(len(t)), t]
