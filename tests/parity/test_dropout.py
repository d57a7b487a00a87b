"""Dropout after every hidden layer of every backbone: the share of units that are dropped, and the others.

What a layer puts out is compared with what the next one gets, so nothing is assumed of how units are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import sequel_flax
import sequel_lightning
from sequel_core.stream.arrays import FloatArray

SHAPE = (8, 8, 3)
RATE = 0.4
SAMPLES = 48

MLP = [("dense_0", "dense_1"), ("dense_1", "dense_2"), ("dense_2", "head")]
CNN = [("conv_0", "conv_1"), ("conv_1", "dense_0"), ("dense_0", "dense_1"), ("dense_1", "head")]
RESNET = [
    (f"stage_{stage}_block_{block}/norm_0", f"stage_{stage}_block_{block}/conv_1")
    for stage in range(4)
    for block in range(2)
]
BACKBONES: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "mlp": ("MLP", {"widths": (60, 50, 40)}, MLP),
    "cnn": ("CNN", {"channels": (6, 8), "linear_widths": (50, 40)}, CNN),
    "resnet18": ("ResNet18", {"channels": 4}, RESNET),
    "resnet18_thin": ("ResNet18Thin", {"channels": 4, "norm": "group"}, RESNET),
}
"""Class, settings, and each layer before dropout with the layer that comes next."""

Calls = dict[str, tuple[FloatArray, FloatArray]]  # layer: what it gets, and what it puts out, channels last


def calls_in_flax(
    class_name: str, settings: dict[str, Any], dropout: float, train: bool, x: FloatArray
) -> Calls:
    model = getattr(sequel_flax, class_name)(dropout=dropout, **settings)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape)), shapes)
    calls: Calls = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            calls["/".join(context.module.path)] = args[0], out
        return out

    @jax.jit
    def run(variables: Any) -> Calls:
        with nn.intercept_methods(note):
            model.apply(
                variables, x, train=train, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"]
            )
        return dict(calls)

    return {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in run(variables).items()}


def calls_in_torch(
    class_name: str, settings: dict[str, Any], dropout: float, train: bool, x: FloatArray
) -> Calls:
    model = getattr(sequel_lightning, class_name)(dropout=dropout, image_shape=SHAPE, **settings)
    model.double().train(train)
    calls: Calls = {}

    def note(name: str, args: Any, out: Any) -> None:
        last = [a.detach().movedim(1, -1).numpy() for a in (args[0], out)]
        calls[name.replace(".", "/")] = last[0], last[1]

    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, args, out, name=name: note(name, args, out))
    torch.manual_seed(0)
    model(torch.from_numpy(x).movedim(-1, 1))
    return calls


both = pytest.mark.parametrize("calls_of", [calls_in_flax, calls_in_torch], ids=["flax", "lightning"])
slow = pytest.param("resnet18", marks=pytest.mark.slow)


def units(calls: Calls, layer: str, following: str) -> tuple[FloatArray, FloatArray]:
    """Return what a layer puts out, after ReLU, and what the next one gets, `[B, ...]` alike."""
    before, after = np.maximum(calls[layer][1], 0), calls[following][0]
    return before.reshape(after.shape), after


@both
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18_thin", slow])
def test_each_hidden_layer_drops_its_share_and_scales_the_rest(
    name: str, calls_of: Callable[..., Calls], rng: np.random.Generator
) -> None:
    class_name, settings, layers = BACKBONES[name]
    x = rng.normal(size=(SAMPLES, *SHAPE))
    calls = calls_of(class_name, settings, RATE, True, x)
    dropped = {}
    for layer, following in layers:
        before, after = units(calls, layer, following)
        active, mask = before > 0, after == 0
        count = active.sum()
        assert count > 500
        assert abs(mask[active].mean() - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / count), layer
        np.testing.assert_allclose(
            after[active & ~mask], before[active & ~mask] / (1 - RATE), rtol=1e-9, err_msg=layer
        )
        # Each sample has another mask: two masks agree as often as independent ones.
        known = active[1:] & active[:-1]
        agree = (mask[1:] == mask[:-1])[known].mean()
        chance = RATE**2 + (1 - RATE) ** 2
        assert abs(agree - chance) < 6 * np.sqrt(chance * (1 - chance) / known.sum()), layer
        dropped[layer] = active, mask
    for (one, a), (other, b) in zip(list(dropped.items())[:-1], list(dropped.items())[1:], strict=True):
        if a[0].shape == b[0].shape:  # and each layer has another mask
            known = a[0] & b[0]
            agree = (a[1] == b[1])[known].mean()
            assert abs(agree - chance) < 6 * np.sqrt(chance * (1 - chance) / known.sum()), (one, other)


@both
@pytest.mark.parametrize("name", ["mlp", "cnn", slow])
def test_nothing_is_dropped_in_evaluation(
    name: str, calls_of: Callable[..., Calls], rng: np.random.Generator
) -> None:
    class_name, settings, layers = BACKBONES[name]
    x = rng.normal(size=(4, *SHAPE))
    calls = calls_of(class_name, settings, RATE, False, x)
    for layer, following in layers:
        before, after = units(calls, layer, following)
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-7, err_msg=layer)
    assert jnp.isfinite(calls["head"][1]).all()
