"""Classification models of torchvision, by name; in Lightning only."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def load_models() -> Any:
    """Return `torchvision.models`, imported so that it loads beside any build of PyTorch."""
    import sequel_lightning._torchvision  # noqa: F401, I001 - before torchvision
    from torchvision import models

    return models


class TorchvisionModel(nn.Module):
    """A model of torchvision whose last dense layer is replaced by one for the classes.

    Args:
        model: name, one of `torchvision.models.list_models(torchvision.models)`.
        weights: trained weights to start from, as torchvision names them (`DEFAULT`, `IMAGENET1K_V1`); None
            for none.
        num_classes: outputs.
        image_shape: (H, W, C) of the images.

    Raises:
        ValueError: torchvision has no such model or no such weights, the model's last layer is not a dense
            one, or the images do not fit.

    Example:
        >>> import torch
        >>> from sequel_lightning import TorchvisionModel
        >>> net = TorchvisionModel("resnet18", num_classes=10)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: str = "mobilenet_v3_small",
        weights: str | None = None,
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (32, 32, 3),
    ) -> None:
        super().__init__()
        models = load_models()
        names = models.list_models(models)
        if model not in names:
            near = difflib.get_close_matches(model, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
            raise ValueError(f"model must be a classification model of torchvision, got {model!r}{hint}")
        known = [entry.name for entry in models.get_model_weights(model)]
        if weights not in (None, "DEFAULT", *known):
            raise ValueError(
                f"weights must be null, DEFAULT or {', '.join(known)} for model={model}, got {weights!r}"
            )
        if image_shape[-1] != 3:
            raise ValueError(
                f"torchvision's models need images with 3 channels, got images of shape {list(image_shape)}; "
                "use backbone=cnn or a benchmark of colour images"
            )
        self.arguments = (model, weights, num_classes, image_shape)
        self.net: nn.Module = models.get_model(model, weights=weights)
        dense = [name for name, layer in self.net.named_modules() if isinstance(layer, nn.Linear)]
        if not dense or list(self.net.named_modules())[-1][0] != dense[-1]:
            raise ValueError(
                f"model must be one whose last layer is dense, so that it can be replaced, got {model!r}; "
                "use another one, for example resnet18"
            )
        last = self.net.get_submodule(dense[-1])
        assert isinstance(last, nn.Linear)
        owner, _, name = dense[-1].rpartition(".")
        setattr(self.net.get_submodule(owner), name, nn.Identity())
        self.head = nn.Linear(last.in_features, num_classes)
        self._check(image_shape)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as images come; faster

    def _check(self, image_shape: tuple[int, int, int]) -> None:
        """Train on nothing: tensors without values, so that neither weights nor statistics change."""
        height, width, channels = image_shape
        weightless = {key: value.to("meta") for key, value in self.state_dict().items()}
        try:
            functional_call(self, weightless, torch.zeros(2, channels, height, width, device="meta"))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"images of shape {list(image_shape)} do not fit torchvision's {self.arguments[0]}, which "
                f"says: {error}; use another model, for example resnet18"
            ) from error

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the initial weights again, from torch's generator with this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.load_state_dict(type(self)(*self.arguments).state_dict())

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer `[B, D]` of images `[B, C, H, W]`."""
        features: Tensor = self.net(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` of images `[B, C, H, W]`."""
        logits: Tensor = self.head(self.features(x))
        return logits
