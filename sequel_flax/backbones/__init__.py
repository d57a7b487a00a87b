"""Built-in networks, the same names and initial weights as in `sequel_lightning.backbones`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sequel_core.hparams import Dtype
from sequel_core.plan import initial_weights
from sequel_core.task import StreamSpec
from sequel_flax.backbones.mlp import MLP

__all__ = ["BACKBONES", "MLP", "initial_params"]

BACKBONES: dict[str, type[nn.Module]] = {"mlp": MLP}


def initial_params(model: nn.Module, spec: StreamSpec, seed: int, dtype: Dtype = "float32") -> Any:
    """Return the initial parameters: from the plan for a built-in network, from `model.init` for any other.

    Args:
        model: called as `model(x, train=...)` with images `[B, H, W, C]`.
        spec: of the benchmark.
        seed: of the run.
        dtype: of the parameters.

    Raises:
        ValueError: the model does not return `[B, num_classes]`, or float64 is asked for while JAX has it
            switched off.
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            'dtype=float64 needs 64-bit JAX; call jax.config.update("jax_enable_x64", True) first'
        )
    image = jnp.zeros((1, *spec.image_shape), dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(seed), image, train=False))["params"]
    logits = jax.eval_shape(lambda params: model.apply({"params": params}, image, train=False), shapes)
    if logits.shape != (1, spec.num_classes):
        raise ValueError(
            f"the model must return logits [B, {spec.num_classes}] for images {[1, *spec.image_shape]}, got"
            f" {list(logits.shape)} for B=1; set num_classes={spec.num_classes}"
        )
    if isinstance(model, tuple(BACKBONES.values())):
        leaves = flatten_dict(shapes, sep="/")
        return unflatten_dict(
            {
                path: jnp.asarray(initial_weights(seed, path, leaf.shape, _fan_in(leaves, path)), dtype)
                for path, leaf in leaves.items()
            },
            sep="/",
        )
    params = model.init(jax.random.key(seed), image, train=False)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def _fan_in(leaves: dict[str, Any], path: str) -> int:
    kernel = leaves[path.rpartition("/")[0] + "/kernel"]
    return int(kernel.size // kernel.shape[-1])
