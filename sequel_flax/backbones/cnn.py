"""Convolutional network.

    h <- dropout(max-pool(activation(norm(conv(h))))), dense layers alike, logits = head(h)

Mirror: sequel_lightning/backbones/cnn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
from flax import linen as nn

from sequel_core.backbones import CNNHParams
from sequel_flax.backbones.heads import CLASSIFIERS
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
        channels: Output channels of each convolution. A convolution has a bias unless it is normalised.
        kernel_size: Kernel size of the convolutions, >= 1; the padding is `kernel_size // 2` on all sides.
        stride: Stride of the convolutions, >= 1.
        max_pool: Whether 2x2 max-pooling follows each convolution.
        linear_widths: Units of each hidden dense layer; the maps are flattened in the order H, W, C.
        activation: "relu", "tanh", "sigmoid", "elu" or "gelu".
        norm: Normalisation after each convolution, "none", "batch" or "group".
        norm_groups: Number of groups of group normalisation; it divides the channels.
        num_classes: Number of outputs.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        classifier: The last layer, "linear" or "cosine".

    Example:
        >>> import jax.numpy as jnp
        >>> model, x = CNN(channels=(4,), linear_widths=(8,)), jnp.zeros((2, 8, 8, 1))
        >>> model.init_with_output(jax.random.key(0), x)[0].shape
        (2, 10)
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
    classifier: str = "linear"

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        self.settings = CNNHParams(**{name: getattr(self, name) for name in CNNHParams().arguments()})
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
        self.head = CLASSIFIERS[self.classifier](self.num_classes)

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
