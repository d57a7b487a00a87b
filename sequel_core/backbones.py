"""Settings of the built-in backbones, the same networks in both frameworks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sequel_core.settings import Settings, setting
from sequel_core.stream.plan import Init

MAX_UNITS = 100_000
"""Largest width of a layer: two such layers would take 40 GB."""
MAX_LAYERS = 1000
MAX_TOKENS = 10_000_000
CLASSIFIER = "last layer: `linear`, or `cosine`, 10 times the cosines of features and class weights, no bias"
Classifier = Literal["linear", "cosine"]
VOCAB_SIZE = "number of different token ids, which are 0 to vocab_size - 1"


@dataclass(frozen=True, kw_only=True)
class BackboneHParams(Settings):
    """Settings of a built-in backbone; the base class of the others."""

    type: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("pytorch", "jax")

    init: Init = setting(
        "torch",
        "distribution of the initial weights: `torch`, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and "
        "biases; `xavier` (Glorot & Bengio 2010) and `kaiming` (He et al. 2015), uniform with zero biases; "
        "embeddings are drawn as with `torch`",
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the network's constructor: all settings but `init`."""
        return {name: value for name, value in vars(self).items() if name != "init"}


@dataclass(frozen=True)
class MLPHParams(BackboneHParams):
    """Settings of the multi-layer perceptron: dense layers with ReLU, then one dense layer to the classes.

    Example:
        >>> from sequel_core.backbones import MLPHParams
        >>> MLPHParams(widths=[100, 100]).widths
        (100, 100)
    """

    type: ClassVar[str] = "mlp"

    widths: tuple[int, ...] = setting((256, 256), "number of units of each hidden layer", ge=1, le=MAX_UNITS)
    dropout: float = setting(0.0, "probability of dropping a hidden unit, in training", ge=0, lt=1)
    classifier: Classifier = setting("linear", CLASSIFIER)


def _check_groups(norm: str, groups: int, channels: tuple[int, ...]) -> None:
    """Raise ValueError if the groups of group normalisation do not divide the channels of a layer."""
    indivisible = [c for c in channels if c % groups]
    if norm == "group" and indivisible:
        fits = [g for g in range(1, min(channels) + 1) if all(c % g == 0 for c in channels)]
        raise ValueError(
            f"norm_groups must divide the channels of every layer, got norm_groups={groups} with channels "
            f"{', '.join(map(str, channels))}; use one of {', '.join(map(str, fits))}"
        )


@dataclass(frozen=True)
class CNNHParams(BackboneHParams):
    """Settings of the convolutional network: convolutions, dense layers, then one dense layer to the classes.

    Raises:
        ValueError: a setting has the wrong type or is out of range. Also for max_pool without stride=1,
            and for norm_groups that does not divide all channels.

    Example:
        >>> from sequel_core.backbones import CNNHParams
        >>> CNNHParams(channels=[32, 64], stride=2).feature_shape((28, 28, 1))
        (7, 7, 64)
    """

    type: ClassVar[str] = "cnn"

    channels: tuple[int, ...] = setting(
        (32, 64), "number of channels of each convolution", ge=1, le=MAX_UNITS
    )
    kernel_size: int = setting(
        3,
        "height and width of the kernels, in pixels; images are padded by half of it, rounded down",
        ge=1,
        le=255,
    )
    stride: int = setting(2, "stride of the convolutions, in pixels", ge=1, le=2)
    max_pool: bool = setting(False, "apply 2x2 max pooling after each convolution; needs stride=1")
    linear_widths: tuple[int, ...] = setting(
        (128,), "number of units of each hidden dense layer", ge=1, le=MAX_UNITS
    )
    activation: Literal["relu", "tanh", "sigmoid", "elu", "gelu"] = setting(
        "relu",
        "activation of the convolutions and hidden dense layers: `relu`, `tanh`, `sigmoid`, `elu` or `gelu`",
    )
    norm: Literal["none", "batch", "group"] = setting(
        "none", "normalisation after each convolution: `none`, `batch` or `group`"
    )
    norm_groups: int = setting(
        4,
        "number of groups of channels; must divide the channels of each layer",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(0.0, "probability of dropping a hidden unit, in training", ge=0, lt=1)
    classifier: Classifier = setting("linear", CLASSIFIER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pool and self.stride != 1:
            raise ValueError(
                f"max_pool needs stride=1, because both halve the image, got stride={self.stride}; set "
                "stride=1 or max_pool=false"
            )
        _check_groups(self.norm, self.norm_groups, self.channels)

    def feature_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of the output of the convolutions for images of shape (H, W, C).

        Raises:
            ValueError: the images are too small.
        """
        height, width, channels = image_shape
        for i in range(len(self.channels)):
            height, width = self._after(height), self._after(width)
            if not height * width:
                raise ValueError(
                    f"images of shape {list(image_shape)} are too small for the layers of channels="
                    f"{list(self.channels)}: the max pooling of layer conv_{i} leaves no pixels; use at most "
                    f"{i} layers or max_pool=false"
                )
        return height, width, (channels, *self.channels)[-1]

    def _after(self, size: int) -> int:
        size = (size + 2 * (self.kernel_size // 2) - self.kernel_size) // self.stride + 1
        return size // 2 if self.max_pool else size


@dataclass(frozen=True)
class ResNet18HParams(BackboneHParams):
    """Settings of ResNet-18 (He et al. 2016, https://arxiv.org/abs/1512.03385) for small images.

    The first convolution is 3x3 with stride 1, and there is no max pooling.

    Example:
        >>> from sequel_core.backbones import ResNet18HParams
        >>> ResNet18HParams(channels=20, norm="group", norm_groups=5).channels
        20
    """

    type: ClassVar[str] = "resnet18"

    channels: int = setting(
        64,
        "number of channels of the first of four stages; it doubles from stage to stage",
        ge=1,
        le=MAX_UNITS,
    )
    norm: Literal["batch", "group"] = setting(
        "batch", "normalisation after each convolution: `batch` or `group`"
    )
    norm_groups: int = setting(
        4,
        "number of groups of channels; must divide the channels of each layer",
        ge=1,
        only=("norm", "group"),
    )
    dropout: float = setting(
        0.0, "probability of dropping a unit between the two convolutions of a block, in training", ge=0, lt=1
    )
    classifier: Classifier = setting("linear", CLASSIFIER)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self.norm, self.norm_groups, (self.channels,))


@dataclass(frozen=True)
class ResNet18ThinHParams(ResNet18HParams):
    """Settings of ResNet-18 with 20 channels in its first stage (https://arxiv.org/abs/1706.08840).

    Example:
        >>> from sequel_core.backbones import ResNet18ThinHParams
        >>> ResNet18ThinHParams().channels
        20
    """

    type: ClassVar[str] = "resnet18_thin"

    channels: int = setting(
        20,
        "number of channels of the first of four stages; it doubles from stage to stage",
        ge=1,
        le=MAX_UNITS,
    )


@dataclass(frozen=True)
class TorchvisionHParams(BackboneHParams):
    """Settings of a classification model of torchvision, whose last dense layer is replaced.

    Raises:
        ValueError: a setting has the wrong type, or init is given.

    Example:
        >>> from sequel_core.backbones import TorchvisionHParams
        >>> TorchvisionHParams(model="resnet50").weights is None
        True
    """

    type: ClassVar[str] = "torchvision"
    modes: ClassVar[tuple[str, ...]] = ("pytorch",)

    model: str = setting("mobilenet_v3_small", "name of the model, one of torchvision.models.list_models()")
    weights: str | None = setting(None, "pretrained weights, for example DEFAULT; null for random weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "torch":
            raise ValueError(
                f"init must be torch for a model of torchvision, which initialises itself, got {self.init}; "
                "drop init"
            )


@dataclass(frozen=True)
class TransformerHParams(BackboneHParams):
    """Settings of the transformer encoder for token ids (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Layer normalisation precedes attention and the feed-forward layers (https://arxiv.org/abs/2002.04745).

    Raises:
        ValueError: a setting has the wrong type or is out of range, or num_heads does not divide hidden_size.

    Example:
        >>> from sequel_core.backbones import TransformerHParams
        >>> TransformerHParams(hidden_size=32, causal=False).num_heads
        4
    """

    type: ClassVar[str] = "transformer"

    vocab_size: int = setting(256, VOCAB_SIZE, ge=1, le=MAX_TOKENS)
    max_length: int = setting(128, "largest number of tokens of a sequence", ge=1, le=MAX_UNITS)
    hidden_size: int = setting(64, "number of units of each token", ge=1, le=MAX_UNITS)
    num_layers: int = setting(2, "number of blocks of attention and feed-forward layers", ge=1, le=MAX_LAYERS)
    num_heads: int = setting(4, "number of attention heads; must divide hidden_size", ge=1, le=MAX_UNITS)
    feed_forward_size: int = setting(
        128, "number of hidden units of the feed-forward layers", ge=1, le=MAX_UNITS
    )
    causal: bool = setting(
        True,
        "a token attends only to itself and to earlier tokens, which next-token prediction needs; with false "
        "it attends to all tokens, which is better for classification",
    )
    dropout: float = setting(
        0.0,
        "probability of dropping a unit of the embeddings and of the output of each attention and "
        "feed-forward layer, in training",
        ge=0,
        lt=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size, got num_heads={self.num_heads} with hidden_size="
                f"{self.hidden_size}; use num_heads=1 or another hidden_size"
            )


@dataclass(frozen=True)
class GRUHParams(BackboneHParams):
    """Settings of the gated recurrent units for token ids (Cho et al. 2014, https://arxiv.org/abs/1406.1078).

    Example:
        >>> from sequel_core.backbones import GRUHParams
        >>> GRUHParams(hidden_size=32).num_layers
        1
    """

    type: ClassVar[str] = "gru"

    vocab_size: int = setting(256, VOCAB_SIZE, ge=1, le=MAX_TOKENS)
    hidden_size: int = setting(64, "number of units of the embedding and of each layer", ge=1, le=MAX_UNITS)
    num_layers: int = setting(1, "number of recurrent layers", ge=1, le=MAX_LAYERS)
    dropout: float = setting(
        0.0, "probability of dropping an output unit of each layer, in training", ge=0, lt=1
    )


BACKBONES: dict[str, type[BackboneHParams]] = {
    cls.type: cls
    for cls in (
        MLPHParams,
        CNNHParams,
        ResNet18HParams,
        ResNet18ThinHParams,
        TorchvisionHParams,
        TransformerHParams,
        GRUHParams,
    )
}

FOR_TOKENS = ("transformer", "gru")
"""Backbones whose inputs are token ids `[B, L]`; the others take images or, an MLP, any array."""
