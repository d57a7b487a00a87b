"""The normalisation layers that networks share."""

from __future__ import annotations

from torch import nn


def normalisation(norm: str, channels: int, groups: int) -> nn.Module:
    """Return the layer that a network's settings name, `batch` or `group`."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)
