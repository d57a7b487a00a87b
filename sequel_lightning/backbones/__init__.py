"""Built-in networks, the same names and initial weights as in `sequel_flax.backbones`, and torchvision's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.plan import Init, check_built_in, initial_weights
from sequel_lightning.backbones.cnn import CNN
from sequel_lightning.backbones.gru import GRU
from sequel_lightning.backbones.mlp import MLP, TaskHeads
from sequel_lightning.backbones.resnet import ResNet18, ResNet18Thin
from sequel_lightning.backbones.torchvision import TorchvisionModel
from sequel_lightning.backbones.transformer import Transformer

__all__ = [
    "BACKBONES",
    "CNN",
    "GRU",
    "MLP",
    "ResNet18",
    "ResNet18Thin",
    "TaskHeads",
    "TorchvisionModel",
    "Transformer",
    "canonical_weights",
    "initialise",
]

BACKBONES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet18_thin": ResNet18Thin,
    "torchvision": TorchvisionModel,
    "transformer": Transformer,
    "gru": GRU,
}

KERNELS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATISTICS = {"running_mean": "mean", "running_var": "var"}
"""What Flax calls the buffers of batch normalisation; it does not count batches."""


def canonical_name(net: nn.Module, name: str) -> str:
    """Return an array's name in the canonical layout, Flax's: `dense_0/kernel` for `dense_0.weight`."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight":
        layer = net.get_submodule(owner)
        leaf = "kernel" if isinstance(layer, KERNELS) else "scale"
        leaf = "embedding" if isinstance(layer, nn.Embedding) else leaf
    leaf = STATISTICS.get(leaf, leaf)
    return "/".join([*owner.split("."), leaf]) if owner else leaf


def canonical_weights(net: nn.Module) -> dict[str, FloatArray]:
    """Return copies of the parameters and of the running statistics in the canonical layout.

    The layout is Flax's, so that weights of both frameworks can be compared.

    Args:
        net: a network.

    Returns:
        Arrays by path: `layer/kernel` `[in, out]` or `[H, W, in, out]`; `layer/bias`, `layer/scale`,
        `layer/mean` and `layer/var` `[out]`.

    Example:
        >>> from sequel_lightning import MLP
        >>> weights = canonical_weights(MLP((16,), num_classes=10, image_shape=(8, 8, 1)))
        >>> {name: array.shape for name, array in weights.items()}
        {'dense_0/bias': (16,), 'dense_0/kernel': (64, 16), 'head/bias': (10,), 'head/kernel': (16, 10)}
    """
    weights = {}
    for name, p in sorted(_arrays(net).items()):
        path, array = canonical_name(net, name), p.detach().cpu().numpy()
        if path.endswith("/kernel"):
            array = array.transpose(*range(2, array.ndim), 1, 0)
        weights[path] = np.array(array, order="C")
    return weights


@torch.no_grad()
def initialise(net: nn.Module, seed: int, init: Init = "torch") -> nn.Module:
    """Set a built-in network to the initial weights of a seed, which are the same in both frameworks.

    A model of torchvision is initialised as torchvision does it. Any other network stays as it is.

    Args:
        net: a network, changed in place.
        seed: of the run, >= 0.
        init: the distribution of the weights; see `initial_weights`.

    Returns:
        The network.

    Raises:
        ValueError: init is unknown, or it is given for a network that is not built in.

    Example:
        >>> import torch
        >>> from sequel_lightning import MLP
        >>> a, b = (initialise(MLP((16,)), seed=3) for _ in range(2))
        >>> torch.equal(a.head.weight, b.head.weight)
        True
    """
    trunk = net.trunk if isinstance(net, TaskHeads) else net
    built_in = isinstance(trunk, tuple(BACKBONES.values())) and not isinstance(trunk, TorchvisionModel)
    check_built_in(init, built_in)
    if isinstance(net, TorchvisionModel):
        net.initialise(seed)
    elif built_in:
        for name, p in _arrays(net).items():
            path = canonical_name(net, name)
            owner = net.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.Embedding):
                p.copy_(torch.from_numpy(initial_weights(seed, path, tuple(p.shape), p.shape[-1])))
                continue
            if not isinstance(owner, KERNELS):
                p.fill_(1.0 if path.endswith(("/scale", "/var")) else 0.0)
                continue
            fan_in = owner.weight[0].numel()
            if path.endswith("/kernel"):
                shape = (*p.shape[2:], p.shape[1], p.shape[0])
                values = initial_weights(seed, path, shape, fan_in, init)
                values = values.transpose(-1, -2, *range(values.ndim - 2))
            else:
                values = initial_weights(seed, path, tuple(p.shape), fan_in, init)
            p.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return net


def _arrays(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the running statistics of batch normalisation."""
    buffers = {k: b for k, b in net.named_buffers() if k.rpartition(".")[2] in STATISTICS}
    return {**dict(net.named_parameters()), **buffers}
