"""Settings of the built-in backbones, the same networks in both frameworks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.settings import Settings, setting

MOST_UNITS = 100_000
"""The width of a layer has this bound: two such layers alone would take 40 GB."""


@dataclass(frozen=True)
class BackboneHParams(Settings):
    """Settings of a built-in backbone."""

    type: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("pytorch", "jax")


@dataclass(frozen=True)
class MLPHParams(BackboneHParams):
    """Multi-layer perceptron: dense layers with ReLU, then one dense layer to the classes."""

    type: ClassVar[str] = "mlp"

    widths: tuple[int, ...] = setting((256, 256), "units of each hidden layer, in order", ge=1, le=MOST_UNITS)
    dropout: float = setting(0.0, "probability of dropping a hidden unit while training", ge=0, lt=1)


def _check_groups(norm: str, groups: int, channels: tuple[int, ...]) -> None:
    """Raise ValueError where group normalisation cannot divide the channels of a layer."""
    uneven = [c for c in channels if c % groups]
    if norm == "group" and uneven:
        fits = [g for g in range(1, min(channels) + 1) if all(c % g == 0 for c in channels)]
        raise ValueError(
            f"norm_groups must divide the channels of every layer, got norm_groups={groups} with channels "
            f"{', '.join(map(str, channels))}; use one of {', '.join(map(str, fits))}"
        )


@dataclass(frozen=True)
class CNNHParams(BackboneHParams):
    """Convolutional network: convolutions, hidden dense layers, then one dense layer to the classes."""

    type: ClassVar[str] = "cnn"

    channels: tuple[int, ...] = setting(
        (32, 64), "channels of each convolution, in order", ge=1, le=MOST_UNITS
    )
    kernel_size: int = setting(
        3, "height and width of the kernels; images are padded by half of it, rounded down", ge=1, le=255
    )
    stride: int = setting(2, "step of the convolutions, in pixels", ge=1, le=2)
    max_pool: bool = setting(False, "take the maxima of 2x2 pixels after each convolution; needs stride=1")
    linear_widths: tuple[int, ...] = setting(
        (128,), "units of each hidden dense layer after the convolutions", ge=1, le=MOST_UNITS
    )
    activation: Literal["relu", "tanh", "sigmoid", "elu", "gelu"] = setting(
        "relu", "of the convolutions and hidden dense layers"
    )
    norm: Literal["none", "batch", "group"] = setting(
        "none", "normalisation after each convolution: by batch statistics, in groups of channels, or none"
    )
    norm_groups: int = setting(
        4,
        "groups of channels, read only by norm=group; must divide channels",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(0.0, "probability of dropping a hidden unit while training", ge=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pool and self.stride != 1:
            raise ValueError(
                f"max_pool needs stride=1, as both halve the image, got stride={self.stride}; set stride=1 "
                "or max_pool=false"
            )
        _check_groups(self.norm, self.norm_groups, self.channels)

    def feature_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (H, W, C) of what the convolutions make of images (H, W, C).

        Raises:
            ValueError: nothing is left of the image.
        """
        height, width, channels = image_shape
        for i in range(len(self.channels)):
            height, width = self._after(height), self._after(width)
            if not height * width:
                raise ValueError(
                    f"images of shape {list(image_shape)} are too small for the layers of channels="
                    f"{list(self.channels)}: nothing is left after the max-pool of layer conv_{i}; use at "
                    f"most {i} layers or max_pool=false"
                )
        return height, width, (channels, *self.channels)[-1]

    def _after(self, size: int) -> int:
        size = (size + 2 * (self.kernel_size // 2) - self.kernel_size) // self.stride + 1
        return size // 2 if self.max_pool else size


@dataclass(frozen=True)
class ResNet18HParams(BackboneHParams):
    """ResNet-18 (He et al. 2016) for small images: a first convolution of 3x3 with stride 1, no max-pool."""

    type: ClassVar[str] = "resnet18"

    channels: int = setting(
        64, "channels of the first of four stages; each has twice the one before's", ge=1, le=MOST_UNITS
    )
    norm: Literal["batch", "group"] = setting(
        "batch", "normalisation after each convolution: by batch statistics, or in groups of channels"
    )
    norm_groups: int = setting(
        4,
        "groups of channels, read only by norm=group; must divide channels",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(
        0.0, "probability of dropping a unit between the convolutions of a block while training", ge=0, lt=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self.norm, self.norm_groups, (self.channels,))


@dataclass(frozen=True)
class ResNet18ThinHParams(ResNet18HParams):
    """ResNet-18 with 20 channels in its first stage (Lopez-Paz & Ranzato 2017)."""

    type: ClassVar[str] = "resnet18_thin"

    channels: int = setting(
        20, "channels of the first of four stages; each has twice the one before's", ge=1, le=MOST_UNITS
    )


@dataclass(frozen=True)
class TorchvisionHParams(BackboneHParams):
    """A classification model of torchvision; its last dense layer is replaced by one for the classes."""

    type: ClassVar[str] = "torchvision"
    modes: ClassVar[tuple[str, ...]] = ("pytorch",)

    model: str = setting("mobilenet_v3_small", "name, as torchvision.models.list_models() gives it")
    weights: str | None = setting(None, "trained weights to start from, for example DEFAULT; null for none")


BACKBONES: dict[str, type[BackboneHParams]] = {
    cls.type: cls
    for cls in (MLPHParams, CNNHParams, ResNet18HParams, ResNet18ThinHParams, TorchvisionHParams)
}
