"""ResNet-18 for small images (He et al. 2016, section 4.2; https://arxiv.org/abs/1512.03385).

    block: h <- relu(norm(conv(dropout(relu(norm(conv(h)))))) + shortcut(h))
    shortcut: h, or norm(1x1 conv(h)) if the block changes the shape

Mirror: sequel_lightning/backbones/resnet.py.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from sequel_core.backbones import ResNet18HParams
from sequel_flax.backbones.heads import CLASSIFIERS
from sequel_flax.backbones.normalisation import normalisation, normalised

STAGES = 4
BLOCKS = 2


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut.

    Args:
        channels: Output channels.
        stride: Stride of the first convolution.
        changes: Whether the output differs from the input in shape.
        norm: "batch" or "group".
        norm_groups: Number of groups of group normalisation.
        dropout: Probability of dropping a unit between the convolutions, in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> block = Block(channels=4, stride=2, changes=True, norm="group", norm_groups=2, dropout=0.0)
        >>> block.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 2)), train=True)[0].shape
        (1, 4, 4, 4)
    """

    channels: int
    stride: int
    changes: bool
    norm: str
    norm_groups: int
    dropout: float

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        self.conv_0 = nn.Conv(self.channels, (3, 3), self.stride, padding=1, use_bias=False)
        self.norm_0 = normalisation(self.norm, self.norm_groups)
        self.drop = nn.Dropout(self.dropout)
        self.conv_1 = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False)
        self.norm_1 = normalisation(self.norm, self.norm_groups)
        if self.changes:
            self.shortcut_conv = nn.Conv(self.channels, (1, 1), padding=0, use_bias=False)
            self.shortcut_norm = normalisation(self.norm, self.norm_groups)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return maps `[B, H, W, channels]` of maps `[B, H, W, C]`."""
        h = nn.relu(normalised(self.norm_0, self.conv_0(x), train))
        h = self.drop(h, deterministic=not train)
        h = normalised(self.norm_1, self.conv_1(h), train)
        if self.changes:
            x = self.shortcut_conv(x[:, :: self.stride, :: self.stride])
            x = normalised(self.shortcut_norm, x, train)
        return nn.relu(h + x)


class ResNet18(nn.Module):
    """A convolution, four stages of two blocks, global average pooling and a linear head.

    The first convolution is 3x3 with stride 1 and without max-pooling. No convolution has a bias.

    Args:
        channels: Channels of the first stage. Each later stage halves the image and doubles the channels.
        norm: "batch" or "group".
        norm_groups: Number of groups of group normalisation; it divides the channels.
        num_classes: Number of outputs.
        dropout: Probability of dropping a unit between the convolutions of a block, in [0, 1).
        classifier: The last layer, "linear" or "cosine".

    Example:
        >>> import jax.numpy as jnp
        >>> model = ResNet18(channels=4)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> variables["params"]["head"]["kernel"].shape
        (32, 10)
    """

    channels: int = 64
    norm: str = "batch"
    norm_groups: int = 4
    num_classes: int = 10
    dropout: float = 0.0
    classifier: str = "linear"

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        settings = (self.channels, self.norm, self.norm_groups, self.dropout, self.classifier)
        ResNet18HParams(*settings)  # type: ignore[arg-type]
        self.conv_0 = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False)
        self.norm_0 = normalisation(self.norm, self.norm_groups)
        for stage in range(STAGES):
            for block in range(BLOCKS):
                changes = block == 0 and stage > 0
                layer = Block(
                    self.channels * 2**stage,
                    2 if changes else 1,
                    changes,
                    self.norm,
                    self.norm_groups,
                    self.dropout,
                )
                setattr(self, f"stage_{stage}_block_{block}", layer)
        self.head = CLASSIFIERS[self.classifier](self.num_classes)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the last hidden layer `[B, D]` of images `[B, H, W, C]`."""
        x = nn.relu(normalised(self.norm_0, self.conv_0(x), train))
        for stage in range(STAGES):
            for block in range(BLOCKS):
                x = getattr(self, f"stage_{stage}_block_{block}")(x, train)
        return x.mean((1, 2))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[B, num_classes]` of images `[B, H, W, C]`."""
        logits: jax.Array = self.head(self.features(x, train))
        return logits


class ResNet18Thin(ResNet18):
    """ResNet-18 with 20 channels in the first stage, as in GEM (Lopez-Paz & Ranzato 2017).

    The paper is https://arxiv.org/abs/1706.08840. The arguments are those of `ResNet18`.

    Example:
        >>> ResNet18Thin().channels
        20
    """

    channels: int = 20
