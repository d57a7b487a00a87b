"""Networks: the checks of the constructors, and training modes that are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sequel_core.stream.benchmark import StreamSpec
from sequel_lightning.trees import Params


def blank_image(spec: StreamSpec, like: Tensor) -> Tensor:
    """Return one input of zeros `[1, C, H, W]`, normalised for weights of the dtype of `like`."""
    height, width, channels = spec.image_shape
    dtype = getattr(torch, spec.x.dtype)
    if dtype == torch.uint8 or dtype.is_floating_point:
        dtype = torch.get_default_dtype() if is_lazy(like) else like.dtype
    return torch.zeros((1, channels, height, width), dtype=dtype, device=like.device)


def check_arguments(net: Any, spec: Any) -> None:
    """Raise ValueError unless the network is a module with parameters, and the spec a StreamSpec or None."""
    if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        received = f"a {type(net).__name__}" + (" without any" if isinstance(net, nn.Module) else "")
        raise ValueError(f"net must be a torch.nn.Module with parameters, got {received}")
    if spec is not None and not isinstance(spec, StreamSpec):
        raise ValueError(
            f"spec must be a StreamSpec or None, got a {type(spec).__name__}; pass benchmark.spec"
        )


def check_network(net: nn.Module, spec: StreamSpec | None) -> None:
    """Run the network on a blank image of the stream, which also initialises lazy layers.

    Args:
        net: the network.
        spec: of the stream; without one nothing is checked.

    Raises:
        ValueError: the network does not take the image, or does not return `[B, num_classes]`.
    """
    if spec is None:
        return
    image = blank_image(spec, next(net.parameters()))
    shape = image.shape
    try:
        with evaluating(net), torch.no_grad():
            logits = net(image)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the network must take images {list(shape)}, the stream's, as [B, C, H, W]: "
            f"{' '.join(str(error).split())}; make it for images {list(spec.image_shape)}"
        ) from error
    returned = list(getattr(logits, "shape", ()))
    if returned != [1, spec.num_classes]:
        raise ValueError(
            f"the network must return logits [B, {spec.num_classes}] for images {list(shape)}, got "
            f"{returned} for B=1; set num_classes={spec.num_classes}"
        )


def check_features(net: nn.Module, name: str) -> None:
    """Raise ValueError if the network lacks `features` or `head`, which the method of that name needs."""
    for part, what in (("features", "a method features(x), the last hidden layer"), ("head", "a head")):
        if not callable(getattr(net, part, None)):
            raise ValueError(
                f"{name} needs a network with {what}, so that net(x) is net.head(net.features(x)); "
                f"{type(net).__name__} has no {part}"
            )


def check_no_batch_stats(net: nn.Module, name: str, reason: str) -> None:
    """Raise ValueError if the network has running statistics, which the method of that name cannot follow."""
    if any(getattr(module, "running_mean", None) is not None for module in net.modules()):
        raise ValueError(
            f"{name} cannot train a network with batch normalisation: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def frozen_network(net: nn.Module) -> tuple[Params, Params]:
    """Return the weights and the running statistics of a kept network, by name."""
    return dict(net.named_parameters()), dict(net.named_buffers())


def apply_head(module: Any, features: Tensor) -> Tensor:
    """Return the logits `[B, num_classes]` of the network's last layer for features `[B, D]`."""
    logits: Tensor = module.head(features)
    return logits


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; afterwards every submodule has its previous mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextmanager
def modes_kept_at_errors(module: nn.Module) -> Iterator[None]:
    """After an error, give every submodule its previous mode, which Lightning's validation does not do."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    except BaseException:
        for submodule, training in modes:
            submodule.training = training
        raise
