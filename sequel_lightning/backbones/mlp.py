"""Multi-layer perceptron. Mirror: sequel_flax/backbones/mlp.py."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sequel_lightning.backbones.heads import CLASSIFIERS


class MLP(nn.Sequential):
    """Hidden layers of ReLU units, each followed by dropout, and a linear head.

    Args:
        widths: units of each hidden layer.
        num_classes: outputs.
        dropout: probability that a hidden unit is dropped, in [0, 1).
        image_shape: (H, W, C) of the images, or the shape of other inputs, such as (F,).
        classifier: the last layer, linear or cosine.

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
        classifier: str = "linear",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        fan_in = math.prod(image_shape)
        for i, width in enumerate(widths):
            layers[f"dense_{i}"] = nn.Linear(fan_in, width)
            layers[f"relu_{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout_{i}"] = nn.Dropout(dropout)
            fan_in = width
        layers["head"] = CLASSIFIERS[classifier](fan_in, num_classes)
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


class TaskHeads(nn.Module):
    """A linear head for each task on a shared network; it takes the task of each sample.

    It needs settings with `task_given=True`, or the task scenario.

    Args:
        trunk: the shared network, a module that returns features `[B, width]`.
        width: number of features.
        num_classes: outputs of a head.
        num_tasks: number of heads.

    Example:
        >>> import torch
        >>> from sequel_lightning import MLP, TaskHeads
        >>> net = TaskHeads(MLP((8,), num_classes=6), width=6, num_classes=10, num_tasks=3)
        >>> net(torch.zeros(2, 1, 28, 28), torch.tensor([0, 2])).shape
        torch.Size([2, 10])
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk, self.num_tasks = trunk, num_tasks
        for k in range(num_tasks):
            self.add_module(f"head_{k}", nn.Linear(width, num_classes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return outputs `[B, num_classes]` of inputs `[B, ...]` by the heads of their tasks t `[B]`."""
        features = self.trunk(x)
        outputs = torch.stack([getattr(self, f"head_{k}")(features) for k in range(self.num_tasks)], dim=1)
        return outputs[torch.arange(len(t), device=t.device), t.long()]
