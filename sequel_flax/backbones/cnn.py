"""Convolutional network.

    h <- dropout(max-pool(activation(norm(conv(h))))), dense layers alike, logits = head(h)

Mirror: sequel_lightning/backbones/cnn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

import jax
from flax import linen as nn

from sequel_core.backbones import CNNHParams
from sequel_flax.backbones.normalisation import normalisation, normalised

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "elu": nn.elu,
    "gelu": partial(nn.gelu, approximate=False),
}


class CNN(nn.Module):
    """Convolutions, hidden dense layers and a linear head; see `sequel_core.hparams.CNNHParams`.

    Args:
        channels: of each convolution, which has a bias unless it is normalised.
        kernel_size: of the convolutions, padded with `kernel_size // 2` zeros on all sides.
        stride: of the convolutions.
        max_pool: take the maxima of 2x2 pixels after each convolution.
        linear_widths: units of each hidden dense layer, after the maps are read in the order H, W, C.
        activation: relu, tanh, sigmoid, elu or gelu.
        norm: none, batch or group, after each convolution.
        norm_groups: of group normalisation.
        num_classes: outputs.
        dropout: probability that a hidden unit is dropped, in [0, 1).
    """

    channels: Sequence[int] = (32, 64)
    kernel_size: int = 3
    stride: int = 2
    max_pool: bool = False
    linear_widths: Sequence[int] = (128,)
    activation: str = "relu"
    norm: str = "none"
    norm_groups: int = 4
    num_classes: int = 10
    dropout: float = 0.0

    def setup(self) -> None:
        """Name the layers as they are in the canonical layout."""
        self.settings = CNNHParams(**{spec.name: getattr(self, spec.name) for spec in fields(CNNHParams)})
        for i, channels in enumerate(self.channels):
            conv = nn.Conv(
                channels,
                (self.kernel_size, self.kernel_size),
                self.stride,
                padding=self.kernel_size // 2,
                use_bias=self.norm == "none",
            )
            setattr(self, f"conv_{i}", conv)
            if self.norm != "none":
                setattr(self, f"norm_{i}", normalisation(self.norm, self.norm_groups))
        for i, width in enumerate(self.linear_widths):
            setattr(self, f"dense_{i}", nn.Dense(width))
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the last hidden layer `[B, D]` of images `[B, H, W, C]`."""
        self.settings.feature_shape(x.shape[1:])
        activation = ACTIVATIONS[self.activation]
        for i in range(len(self.channels)):
            x = getattr(self, f"conv_{i}")(x)
            if self.norm != "none":
                x = normalised(getattr(self, f"norm_{i}"), x, train)
            x = activation(x)
            if self.max_pool:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = self.drop(x, deterministic=not train)
        x = x.reshape((x.shape[0], -1))
        for i in range(len(self.linear_widths)):
            x = activation(getattr(self, f"dense_{i}")(x))
            x = self.drop(x, deterministic=not train)
        return x

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[B, num_classes]` of images `[B, H, W, C]`."""
        logits: jax.Array = self.head(self.features(x, train))
        return logits
