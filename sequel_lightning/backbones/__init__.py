"""Built-in networks, the same names and initial weights as in `sequel_flax.backbones`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sequel_core.plan import initial_weights
from sequel_core.task import FloatArray
from sequel_lightning.backbones.mlp import MLP

__all__ = ["BACKBONES", "MLP", "canonical_weights", "initialise"]

BACKBONES: dict[str, type[nn.Module]] = {"mlp": MLP}


def canonical_name(net: nn.Module, name: str) -> str:
    """Return a parameter's name in the canonical layout, Flax's: `dense_0/kernel` for `dense_0.weight`."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight":
        leaf = "kernel" if isinstance(net.get_submodule(owner), nn.Linear) else "scale"
    return "/".join([*owner.split("."), leaf]) if owner else leaf


def canonical_weights(net: nn.Module) -> dict[str, FloatArray]:
    """Return copies of the parameters in the canonical layout: `layer/kernel` `[in, out]`, `layer/bias`."""
    weights = {}
    for name, p in sorted(net.named_parameters()):
        path, array = canonical_name(net, name), p.detach().cpu().numpy()
        weights[path] = np.array(array.T if path.endswith("/kernel") else array, order="C")
    return weights


@torch.no_grad()
def initialise(net: nn.Module, seed: int) -> nn.Module:
    """Set a built-in network to the initial weights of the plan and return it; any other stays as it is.

    Args:
        net: changed in place.
        seed: of the run.
    """
    if isinstance(net, tuple(BACKBONES.values())):
        for name, p in net.named_parameters():
            path = canonical_name(net, name)
            fan_in = int(net.get_parameter(name.rpartition(".")[0] + ".weight").shape[1])
            shape = tuple(p.shape[::-1]) if path.endswith("/kernel") else tuple(p.shape)
            values = initial_weights(seed, path, shape, fan_in)
            _copy(p, values.T if path.endswith("/kernel") else values)
    return net


def _copy(p: Tensor, values: FloatArray) -> None:
    p.copy_(torch.from_numpy(np.ascontiguousarray(values)))
