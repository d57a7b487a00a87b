"""Built-in networks, the same names and initial weights as in `sequel_lightning.backbones`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sequel_core.hparams import Dtype
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.plan import initial_weights
from sequel_flax.backbones.cnn import CNN
from sequel_flax.backbones.mlp import MLP
from sequel_flax.backbones.normalisation import BatchNorm
from sequel_flax.backbones.resnet import ResNet18, ResNet18Thin
from sequel_flax.bundle import blank_image
from sequel_flax.foreign import adapted

__all__ = [
    "BACKBONES",
    "CNN",
    "MLP",
    "BatchNorm",
    "ResNet18",
    "ResNet18Thin",
    "initial_params",
    "initial_variables",
]

Variables = dict[str, Any]

BACKBONES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet18_thin": ResNet18Thin,
}

CARRIED = ("params", "batch_stats")
"""The collections of variables that a run carries from step to step."""


def initial_variables(model: Any, spec: StreamSpec, seed: int, dtype: Dtype = "float32") -> Variables:
    """Return the initial variables: from the plan for a built-in network, from `model.init` for any other.

    Args:
        model: what `adapted` takes: a linen module, or an NNX module, whose own values are returned; called
            with images `[B, H, W, C]`.
        spec: of the benchmark.
        seed: of the run.
        dtype: of the variables.

    Returns:
        `{"params": ...}`, and `"batch_stats"` where the model has batch normalisation.

    Raises:
        ValueError: the images do not fit the model, it does not return `[B, num_classes]`, it has variables
            that a run does not carry, or float64 is asked for while JAX has it switched off.
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            'dtype=float64 needs 64-bit JAX; call jax.config.update("jax_enable_x64", True) first'
        )
    model, image = adapted(model), blank_image(spec, dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(seed), image, train=False))
    others = [name for name in shapes if name not in CARRIED]
    if others:
        raise ValueError(
            f"the model's variables must be in the collections {' and '.join(CARRIED)}, got "
            f"{', '.join(others)}: a run carries from step to step, and checkpoints, parameters and the "
            "statistics of batch normalisation; drop the layers that keep more"
        )
    logits = jax.eval_shape(lambda variables: model.apply(variables, image, train=False), shapes)
    if logits.shape != (1, spec.num_classes):
        raise ValueError(
            f"the model must return logits [B, {spec.num_classes}] for images {[1, *spec.image_shape]}, got"
            f" {list(logits.shape)} for B=1; set num_classes={spec.num_classes}"
        )
    if not isinstance(model, tuple(BACKBONES.values())):
        drawn = dict(model.init(jax.random.key(seed), image, train=False))
        variables: Variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), drawn)
        return variables
    found = {}
    for collection, tree in shapes.items():
        leaves = flatten_dict(tree, sep="/")
        arrays = {path: jnp.asarray(_initial(leaves, path, seed), dtype) for path in leaves}
        found[collection] = unflatten_dict(arrays, sep="/")
    return found


def initial_params(model: Any, spec: StreamSpec, seed: int, dtype: Dtype = "float32") -> Any:
    """Return the parameters of `initial_variables`."""
    return initial_variables(model, spec, seed, dtype)["params"]


def _initial(leaves: dict[str, Any], path: str, seed: int) -> FloatArray:
    """Return an array's initial values: the plan's in a layer with a kernel, else a normalisation's."""
    layer, _, name = path.rpartition("/")
    shape, kernel = leaves[path].shape, leaves.get(f"{layer}/kernel")
    if kernel is not None:
        return initial_weights(seed, path, shape, kernel.size // kernel.shape[-1])
    return np.full(shape, 1.0 if name in ("scale", "var") else 0.0)
