"""Built-in networks, with the names and initial weights of those in `sequel_lightning.backbones`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sequel_core.hparams import Dtype
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.plan import Init, check_built_in, initial_weights
from sequel_core.stream.trees import specs_text
from sequel_flax.backbones.cnn import CNN
from sequel_flax.backbones.gru import GRU
from sequel_flax.backbones.mlp import MLP, TaskHeads
from sequel_flax.backbones.normalisation import BatchNorm
from sequel_flax.backbones.resnet import ResNet18, ResNet18Thin
from sequel_flax.backbones.transformer import Transformer
from sequel_flax.bundle import blank_input, called
from sequel_flax.foreign import adapted, takes_task

__all__ = [
    "BACKBONES",
    "CNN",
    "GRU",
    "MLP",
    "BatchNorm",
    "ResNet18",
    "ResNet18Thin",
    "TaskHeads",
    "Transformer",
    "initial_params",
    "initial_variables",
]

Variables = dict[str, Any]

BACKBONES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet18_thin": ResNet18Thin,
    "transformer": Transformer,
    "gru": GRU,
}


def initial_variables(
    model: Any, spec: StreamSpec, seed: int, dtype: Dtype = "float32", init: Init = "torch"
) -> Variables:
    """Return the initial variables of a network.

    Those of a built-in network come from the plan, those of another linen module from `model.init`, and those
    of an NNX module are its current values.

    Args:
        model: A linen or an NNX module, called with inputs `[B, ...]`; see `adapted`.
        spec: The specification of the benchmark.
        seed: The seed of the run.
        dtype: The dtype of the variables that are floats.
        init: The distribution of the weights of a built-in network; see `initial_weights`.

    Returns:
        A dict with the tree `params`, and the other collections of variables if there are any, for example
        `batch_stats`.

    Raises:
        ValueError: The inputs do not fit the model, it does not return logits `[B, num_classes]` for class
            labels, `dtype` is float64 and 64-bit JAX is disabled, or `init` is given for a network that is
            not built in.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> spec = RotatedDigits(num_tasks=2, subset=20).spec
        >>> variables = initial_variables(MLP(widths=(8,)), spec, seed=0)
        >>> variables["params"]["dense_0"]["kernel"].shape
        (64, 8)
    """
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            'dtype=float64 needs 64-bit JAX; call jax.config.update("jax_enable_x64", True) first'
        )
    model, x = adapted(model, spec.x), blank_input(spec, dtype)
    trunk = model.trunk if isinstance(model, TaskHeads) else model
    built_in = isinstance(trunk, tuple(BACKBONES.values()))
    check_built_in(init, built_in)
    if isinstance(model, CNN | ResNet18):
        _ = spec.image_shape  # an error if inputs are not images
    task = {"t": jnp.zeros(1, jnp.int32)} if takes_task(model.apply, x) else {}
    make = partial(called, partial(model.init, jax.random.key(seed), train=False, **task), x)
    shapes = jax.eval_shape(make)
    outputs = jax.eval_shape(
        lambda variables: called(partial(model.apply, variables, train=False, **task), x), shapes
    )
    if spec.labelled and getattr(outputs, "shape", (1, spec.num_classes)) != (1, spec.num_classes):
        inputs = f"images {[1, *spec.image_shape]}" if spec.images else f"inputs {specs_text(spec.x)}"
        raise ValueError(
            f"the model must return logits [B, {spec.num_classes}] for {inputs}, got"
            f" {list(outputs.shape)} for B=1; set num_classes={spec.num_classes}"
        )
    if not built_in:

        def converted(leaf: Any) -> Any:
            return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return {name: jax.tree.map(converted, tree) for name, tree in make().items()}
    variables = {}
    for collection, tree in shapes.items():
        leaves = flatten_dict(tree, sep="/")
        arrays = {path: jnp.asarray(_initial(leaves, path, seed, init), dtype) for path in leaves}
        variables[collection] = unflatten_dict(arrays, sep="/")
    return variables


def initial_params(
    model: Any, spec: StreamSpec, seed: int, dtype: Dtype = "float32", init: Init = "torch"
) -> Any:
    """Return the initial parameters of a network; see `initial_variables`.

    Args:
        model: A linen or an NNX module.
        spec: The specification of the benchmark.
        seed: The seed of the run.
        dtype: The dtype of the parameters.
        init: The distribution of the weights of a built-in network; see `initial_weights`.

    Returns:
        The tree of parameters.

    Raises:
        ValueError: See `initial_variables`.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> spec = RotatedDigits(num_tasks=2, subset=20).spec
        >>> sorted(initial_params(MLP(widths=(8,)), spec, seed=0))
        ['dense_0', 'head']
    """
    return initial_variables(model, spec, seed, dtype, init)["params"]


def _initial(leaves: dict[str, Any], path: str, seed: int, init: Init) -> FloatArray:
    """Return the initial value of an array: the plan's in a dense layer or an embedding, else 1 or 0."""
    layer, _, name = path.rpartition("/")
    shape, kernel = leaves[path].shape, leaves.get(f"{layer}/kernel")
    if kernel is not None:
        return initial_weights(seed, path, shape, kernel.size // kernel.shape[-1], init)
    if name == "embedding":
        return initial_weights(seed, path, shape, shape[-1])
    return np.full(shape, 1.0 if name in ("scale", "var") else 0.0)
