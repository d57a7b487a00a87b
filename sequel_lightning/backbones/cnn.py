"""Convolutional network.

    h <- dropout(max-pool(activation(norm(conv(h))))), dense layers alike, logits = head(h)

Mirror: sequel_flax/backbones/cnn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sequel_core.backbones import CNNHParams
from sequel_lightning.backbones.heads import CLASSIFIERS
from sequel_lightning.backbones.normalisation import normalisation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "gelu": F.gelu,
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
        image_shape: (H, W, C) of the images.
        classifier: the last layer, linear or cosine.

    Raises:
        ValueError: a setting out of range, or images too small for the layers.

    Example:
        >>> import torch
        >>> from sequel_lightning import CNN
        >>> net = CNN(channels=(8, 16), norm="group", image_shape=(32, 32, 3))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        stride: int = 2,
        max_pool: bool = False,
        linear_widths: Sequence[int] = (128,),
        activation: str = "relu",
        norm: str = "none",
        norm_groups: int = 4,
        num_classes: int = 10,
        dropout: float = 0.0,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        classifier: str = "linear",
    ) -> None:
        super().__init__()
        self.settings = CNNHParams(
            tuple(channels),
            kernel_size,
            stride,
            max_pool,
            tuple(linear_widths),
            activation,  # type: ignore[arg-type]
            norm,  # type: ignore[arg-type]
            norm_groups,
            dropout,
            classifier,  # type: ignore[arg-type]
        )
        height, width, last = self.settings.feature_shape(image_shape)
        fan_in = image_shape[-1]
        for i, fan_out in enumerate(channels):
            step = stride if kernel_size > 1 else 1
            conv = nn.Conv2d(fan_in, fan_out, kernel_size, step, kernel_size // 2, bias=norm == "none")
            self.add_module(f"conv_{i}", conv)
            if norm != "none":
                self.add_module(f"norm_{i}", normalisation(norm, fan_out, norm_groups))
            fan_in = fan_out
        fan_in = height * width * last
        for i, fan_out in enumerate(linear_widths):
            self.add_module(f"dense_{i}", nn.Linear(fan_in, fan_out))
            fan_in = fan_out
        self.head = CLASSIFIERS[classifier](fan_in, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as images come; faster

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer `[B, D]` of images `[B, C, H, W]`."""
        settings, activation = self.settings, ACTIVATIONS[self.settings.activation]
        for i in range(len(settings.channels)):
            if settings.kernel_size == 1:
                # The stride by hand: oneDNN's in 1x1 kernels corrupts memory below 8 channels (issue 6035).
                x = x[..., :: settings.stride, :: settings.stride]
            x = self.get_submodule(f"conv_{i}")(x)
            if settings.norm != "none":
                x = self.get_submodule(f"norm_{i}")(x)
            x = activation(x)
            if settings.max_pool:
                x = F.max_pool2d(x, 2)
            x = F.dropout(x, settings.dropout, self.training)
        x = x.movedim(-3, -1).flatten(1)
        for i in range(len(settings.linear_widths)):
            x = activation(self.get_submodule(f"dense_{i}")(x))
            x = F.dropout(x, settings.dropout, self.training)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` of images `[B, C, H, W]`."""
        logits: Tensor = self.head(self.features(x))
        return logits
