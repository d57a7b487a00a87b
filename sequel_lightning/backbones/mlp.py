"""Multi-layer perceptron. Mirror: sequel_flax/backbones/mlp.py."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Hidden layers of ReLU units, each followed by dropout, and a linear head.

    Args:
        widths: units of each hidden layer.
        num_classes: outputs.
        dropout: probability that a hidden unit is dropped, in [0, 1).
        image_shape: (H, W, C) of the images, or the shape of other inputs, such as (F,).

    Example:
        >>> import torch
        >>> from sequel_lightning import MLP
        >>> net = MLP((100, 100), num_classes=10, image_shape=(28, 28, 1))
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    head: nn.Linear

    def __init__(
        self,
        widths: Sequence[int] = (256, 256),
        num_classes: int = 10,
        dropout: float = 0.0,
        image_shape: tuple[int, ...] = (28, 28, 1),
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        fan_in = math.prod(image_shape)
        for i, width in enumerate(widths):
            layers[f"dense_{i}"] = nn.Linear(fan_in, width)
            layers[f"relu_{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout_{i}"] = nn.Dropout(dropout)
            fan_in = width
        layers["head"] = nn.Linear(fan_in, num_classes)
        super().__init__(layers)
        self.images = len(image_shape) == 3

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer `[B, D]`; images `[B, C, H, W]` are read in the order H, W, C."""
        x = (x.movedim(-3, -1) if self.images else x).flatten(1)
        for layer in self:
            if layer is not self.head:
                x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` of images `[B, C, H, W]` or other inputs `[B, ...]`."""
        logits: Tensor = self.head(self.features(x))
        return logits
