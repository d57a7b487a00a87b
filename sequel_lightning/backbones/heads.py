"""Last layers of the built-in networks.

    linear: z_c = w_c . h + b_c
    cosine: z_c = 10 cos(w_c, h), without a bias

Mirror: sequel_flax/backbones/heads.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 10.0
EPS = 1e-12


def unit(a: Tensor, axis: int) -> Tensor:
    """Return vectors along an axis, scaled to unit length; a vector of zeros stays one."""
    return a * torch.rsqrt((a * a).sum(axis, keepdim=True) + EPS)


class CosineLinear(nn.Linear):
    """Ten times the cosines of the angles between features and the weights of each class."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` of features `[B, D]`."""
        return SCALE * F.linear(unit(input, -1), unit(self.weight, 1))


CLASSIFIERS: dict[str, type[nn.Linear]] = {"linear": nn.Linear, "cosine": CosineLinear}
