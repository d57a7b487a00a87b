"""ResNet-18 for small images (He et al. 2016, section 4.2; https://arxiv.org/abs/1512.03385).

    block: h <- relu(norm(conv(dropout(relu(norm(conv(h)))))) + shortcut(h))
    shortcut: h, or norm(1x1 conv(h)) if the block changes the shape

Mirror: sequel_flax/backbones/resnet.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sequel_core.backbones import ResNet18HParams
from sequel_lightning.backbones.heads import CLASSIFIERS
from sequel_lightning.backbones.normalisation import normalisation

STAGES = 4
BLOCKS = 2


class Block(nn.Module):
    """Two convolutions of 3x3 with a shortcut around them.

    Args:
        fan_in: channels of the input.
        channels: of the output.
        stride: of the first convolution.
        changes: whether the output has another shape than the input.
        norm: batch or group.
        norm_groups: of group normalisation.
        dropout: probability that a unit between the convolutions is dropped, in [0, 1).
    """

    def __init__(
        self,
        fan_in: int,
        channels: int,
        stride: int,
        changes: bool,
        norm: str,
        norm_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.changes = changes
        self.dropout = dropout
        self.conv_0 = nn.Conv2d(fan_in, channels, 3, stride, 1, bias=False)
        self.norm_0 = normalisation(norm, channels, norm_groups)
        self.conv_1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm_1 = normalisation(norm, channels, norm_groups)
        if changes:
            self.shortcut_conv = nn.Conv2d(fan_in, channels, 1, bias=False)
            self.shortcut_norm = normalisation(norm, channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps `[B, channels, H, W]` of maps `[B, C, H, W]`."""
        h = F.relu(self.norm_0(self.conv_0(x)))
        h = F.dropout(h, self.dropout, self.training)
        h = self.norm_1(self.conv_1(h))
        if self.changes:
            # The stride by hand: oneDNN's in 1x1 kernels corrupts memory below 8 channels (issue 6035).
            x = self.shortcut_conv(x[..., :: self.stride, :: self.stride])
            x = self.shortcut_norm(x)
        return F.relu(h + x)


class ResNet18(nn.Module):
    """A convolution, four stages of two blocks, the mean over all pixels and a linear head.

    The first convolution is 3x3 with stride 1, and no max-pool follows; no convolution has a bias.

    Args:
        channels: of the first stage; each later one halves the image and doubles the channels.
        norm: batch or group.
        norm_groups: of group normalisation.
        num_classes: outputs.
        dropout: probability that a unit between the convolutions of a block is dropped, in [0, 1).
        image_shape: (H, W, C) of the images.
        classifier: the last layer, linear or cosine.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> from sequel_lightning import ResNet18
        >>> net = ResNet18(channels=8, num_classes=10, image_shape=(32, 32, 3))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 64,
        norm: str = "batch",
        norm_groups: int = 4,
        num_classes: int = 10,
        dropout: float = 0.0,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        classifier: str = "linear",
    ) -> None:
        super().__init__()
        ResNet18HParams(channels, norm, norm_groups, dropout, classifier)  # type: ignore[arg-type]
        self.conv_0 = nn.Conv2d(image_shape[-1], channels, 3, 1, 1, bias=False)
        self.norm_0 = normalisation(norm, channels, norm_groups)
        fan_in = channels
        for stage in range(STAGES):
            for block in range(BLOCKS):
                changes = block == 0 and stage > 0
                fan_out = channels * 2**stage
                layer = Block(fan_in, fan_out, 2 if changes else 1, changes, norm, norm_groups, dropout)
                self.add_module(f"stage_{stage}_block_{block}", layer)
                fan_in = fan_out
        self.head = CLASSIFIERS[classifier](fan_in, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as images come; faster

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer `[B, D]` of images `[B, C, H, W]`."""
        x = F.relu(self.norm_0(self.conv_0(x)))
        for stage in range(STAGES):
            for block in range(BLOCKS):
                x = self.get_submodule(f"stage_{stage}_block_{block}")(x)
        return x.mean((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` of images `[B, C, H, W]`."""
        logits: Tensor = self.head(self.features(x))
        return logits


class ResNet18Thin(ResNet18):
    """ResNet-18 with 20 channels in the first stage, as in GEM (Lopez-Paz & Ranzato 2017).

    The paper is https://arxiv.org/abs/1706.08840. The arguments are those of `ResNet18`.

    Example:
        >>> import torch
        >>> from sequel_lightning import ResNet18Thin
        >>> net = ResNet18Thin(num_classes=10)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 20,
        norm: str = "batch",
        norm_groups: int = 4,
        num_classes: int = 10,
        dropout: float = 0.0,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        classifier: str = "linear",
    ) -> None:
        super().__init__(channels, norm, norm_groups, num_classes, dropout, image_shape, classifier)
