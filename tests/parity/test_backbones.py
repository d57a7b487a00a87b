"""The built-in networks in both frameworks and in NumPy: equal logits, losses, gradients and statistics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import sequel_flax
import sequel_flax.backbones
import sequel_flax.build
import sequel_lightning.backbones
import sequel_lightning.build
from sequel_core.backbones import BACKBONES, CNNHParams, MLPHParams, ResNet18HParams, TorchvisionHParams
from sequel_core.experiment.build import build_benchmark
from sequel_core.experiment.compose import compose
from sequel_core.runs.learner import Learner
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.plan import Init, initial_weights
from sequel_core.stream.trees import LeafSpec
from sequel_flax.backbones import BatchNorm, initial_variables
from sequel_lightning.backbones import canonical_weights, initialise
from tests.reference.convolution import Network
from tests.reference.network import Weights, log_softmax

Settings = Mapping[str, Any]

CNN: list[Settings] = [
    {"channels": (4, 6), "linear_widths": (5,)},
    {"channels": (4,), "kernel_size": 2, "norm": "batch", "activation": "elu", "linear_widths": ()},
    {
        "channels": (4, 8),
        "stride": 1,
        "max_pool": True,
        "kernel_size": 5,
        "norm": "group",
        "norm_groups": 2,
        "activation": "gelu",
        "linear_widths": (7, 5),
    },
    {"channels": (4,), "stride": 1, "activation": "tanh"},
    {"channels": (4, 6), "kernel_size": 1, "activation": "sigmoid", "classifier": "cosine"},
]
CASES: list[tuple[str, Settings, bool]] = [
    *(("cnn", settings, True) for settings in CNN),
    ("cnn", CNN[1], False),
    ("resnet18_thin", {"channels": 4}, True),
    ("resnet18_thin", {"channels": 4}, False),
]
SIZE, CLASSES = 9, 10
FAST: Any = {"xla_backend_optimization_level": 0}  # a ResNet compiles in less than half the time
CIFAR10 = Path(os.environ.get("SEQUEL_DATA_DIR", "nowhere")) / "cifar10"
real = pytest.mark.skipif(not (CIFAR10 / "test_images.npy").exists(), reason="needs CIFAR-10's arrays")


def spec(size: int = SIZE, num_classes: int = CLASSES) -> StreamSpec:
    mask = np.ones((1, num_classes), np.bool_)
    return StreamSpec(LeafSpec((size, size, 3), "uint8"), num_classes, 1, "class", mask)


def random_samples() -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, SIZE, SIZE, 3)), rng.integers(CLASSES, size=4)


def cifar10() -> tuple[FloatArray, IntArray]:
    """Return four real images in [-1, 1]."""
    images, labels = (np.load(CIFAR10 / f"test_{part}.npy", mmap_mode="r") for part in ("images", "labels"))
    return images[:4] / 127.5 - 1.0, labels[:4].astype(np.int64)


def torch_network(name: str, settings: Settings, size: int) -> torch.nn.Module:
    """Return a network whose weights and statistics are no longer those that it began with."""
    net = sequel_lightning.backbones.BACKBONES[name](
        **settings, num_classes=CLASSES, image_shape=(size, size, 3)
    )
    initialise(net.double(), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        net(torch.randn((4, 3, size, size), generator=generator, dtype=torch.float64))
    return net


def torch_side(
    net: torch.nn.Module, x: FloatArray, y: IntArray, train: bool
) -> tuple[FloatArray, float, Weights]:
    """Return logits, loss, and in the canonical layout gradients and running statistics after the pass."""
    net.train(train)
    logits = net(torch.from_numpy(x).movedim(-1, 1))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
    loss.backward()
    for p in net.parameters():
        assert p.grad is not None
        p.data = p.grad
    return logits.detach().numpy(), loss.item(), canonical_weights(net)


def flax_side(
    model: Any, weights: Weights, x: FloatArray, y: IntArray, train: bool, fast: bool
) -> tuple[FloatArray, float, Weights]:
    """Do what `torch_side` does, from weights in the canonical layout."""
    initial = initial_variables(model, spec(x.shape[1]), 0)
    paths = {name: list(flatten_dict(tree, sep="/")) for name, tree in initial.items()}
    assert {path for some in paths.values() for path in some} == weights.keys()
    variables = {
        collection: unflatten_dict({path: jnp.asarray(weights[path]) for path in some}, sep="/")
        for collection, some in paths.items()
    }
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, new = model.apply(
            {"params": params, **stats}, jnp.asarray(x), train=train, mutable=["batch_stats"] if train else []
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits, {**stats, **new})

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(params)
    (loss, (logits, new)), gradient = step.compile(compiler_options=FAST if fast else None)(params)
    trees = [flatten_dict(tree, sep="/") for tree in (gradient, *new.values())]
    actual = {path: np.asarray(a) for tree in trees for path, a in tree.items()}
    return np.asarray(logits), float(loss), actual


def numpy_side(
    name: str, settings: Settings, weights: Weights, x: FloatArray, train: bool
) -> tuple[FloatArray, Weights]:
    """Return logits and the running statistics after the pass."""
    full = BACKBONES[name](**settings)
    if isinstance(full, CNNHParams):
        network = Network(weights, full.norm, full.norm_groups, train)
        return network.cnn(x, full.activation, full.stride, full.max_pool), network.statistics
    assert isinstance(full, ResNet18HParams)
    network = Network(weights, full.norm, full.norm_groups, train)
    return network.resnet(x), network.statistics


def relative(a: FloatArray, b: FloatArray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(name: str, settings: Settings, x: FloatArray, y: IntArray, train: bool, fast: bool = True) -> None:
    net = torch_network(name, settings, x.shape[1])
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    weights = canonical_weights(net)
    expected, statistics = numpy_side(name, settings, weights, x, train)
    logits, loss, arrays = torch_side(net, x, y, train)
    flax_logits, flax_loss, flax_arrays = flax_side(model, weights, x, y, train, fast)
    assert relative(logits, expected) < 1e-10
    assert relative(flax_logits, expected) < 1e-10
    expected_loss = -log_softmax(expected, None)[np.arange(len(y)), y].mean()
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert flax_loss == pytest.approx(expected_loss, rel=1e-10)
    assert flax_arrays.keys() == arrays.keys()
    assert [path for path, a in arrays.items() if not relative(flax_arrays[path], a) < 1e-10] == []
    assert bool(statistics) == (train and any(path.endswith("/var") for path in weights))
    assert [path for path, a in statistics.items() if not relative(arrays[path], a) < 1e-10] == []


def name_of(case: Any) -> str:
    if isinstance(case, bool):
        return "train" if case else "evaluate"
    return case if isinstance(case, str) else "-".join(str(v) for v in case.values()).replace(" ", "")


@pytest.mark.parametrize(("name", "settings", "train"), CASES, ids=name_of)
def test_both_frameworks_agree_with_numpy(name: str, settings: Settings, train: bool) -> None:
    check(name, settings, *random_samples(), train)


@real
def test_on_real_images() -> None:
    check("cnn", {"channels": (4, 6), "norm": "batch", "linear_widths": (16,)}, *cifar10(), True)


@real
@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=name_of)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_on_real_images(norm: str, train: bool) -> None:
    check("resnet18_thin", {"channels": 20, "norm": norm}, *cifar10(), train, fast=False)


def test_the_gradient_is_the_slope_of_the_reference() -> None:
    settings = {"channels": (4,), "norm": "batch", "activation": "tanh", "linear_widths": (5,)}
    x, y = random_samples()
    net = torch_network("cnn", settings, SIZE)
    weights = canonical_weights(net)
    _, _, gradient = torch_side(net, x, y, train=True)
    rng = np.random.default_rng(1)
    trained = [path for path in weights if not path.endswith(("/mean", "/var"))]
    direction = {path: rng.normal(size=weights[path].shape) for path in trained}

    def loss(step: float) -> float:
        shifted = {path: a + step * direction.get(path, 0.0) for path, a in weights.items()}
        logits, _ = numpy_side("cnn", settings, shifted, x, train=True)
        return float(-log_softmax(logits, None)[np.arange(len(y)), y].mean())

    derivative = sum(float((gradient[path] * direction[path]).sum()) for path in trained)
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(derivative, rel=1e-6)


# -- initial weights and sizes


@pytest.mark.parametrize("name", ["cnn", "resnet18_thin"])
def test_the_same_initial_weights(name: str) -> None:
    settings: Settings = {"norm": "batch", "channels": (4, 8) if name == "cnn" else 4}
    net = sequel_lightning.backbones.BACKBONES[name](
        **settings, num_classes=CLASSES, image_shape=(SIZE, SIZE, 3)
    )
    ours = canonical_weights(initialise(net.double(), seed=5))
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    variables = initial_variables(model, spec(), 5, "float64")
    flat = {path: a for tree in variables.values() for path, a in flatten_dict(tree, sep="/").items()}
    assert flat.keys() == ours.keys()
    for path, values in ours.items():
        np.testing.assert_array_equal(values, flat[path])
        if path.endswith("/kernel"):
            bound = 1 / np.sqrt(np.prod(values.shape[:-1]))
            assert 0.4 * bound < np.abs(values).mean() < 0.6 * bound
            assert np.abs(values).max() <= bound
        elif "norm" in path:
            assert (values == path.endswith(("/scale", "/var"))).all()


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("mlp", "xavier"),
        ("mlp", "kaiming"),
        ("cnn", "xavier"),
        ("cnn", "kaiming"),
        pytest.param("resnet18_thin", "xavier", marks=pytest.mark.slow),
        pytest.param("resnet18_thin", "kaiming", marks=pytest.mark.slow),
    ],
)
def test_other_initial_weights(name: str, init: Init) -> None:
    """The same in both frameworks; the bounds and the moments of the papers, in NumPy; zero biases."""
    widths: dict[str, Settings] = {"mlp": {"widths": (40, 30)}, "cnn": {"channels": (8, 16)}}
    settings: Settings = widths.get(name, {"channels": 4})
    size = {"num_classes": CLASSES, "image_shape": (SIZE, SIZE, 3)}
    net = sequel_lightning.backbones.BACKBONES[name](**settings, **size)
    ours = canonical_weights(initialise(net.double(), 5, init))
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    variables = initial_variables(model, spec(), 5, "float64", init)
    flat = {path: a for tree in variables.values() for path, a in flatten_dict(tree, sep="/").items()}
    assert flat.keys() == ours.keys()
    for path, values in ours.items():
        np.testing.assert_array_equal(values, flat[path])
        if path.endswith("/kernel"):
            *kernel, fan_in, fan_out = values.shape
            fan_in, fan_out = (int(np.prod(kernel)) * fan for fan in (fan_in, fan_out))
            variance = 2 / (fan_in + fan_out) if init == "xavier" else 2 / fan_in  # of Glorot, of He
            assert np.abs(values).max() <= np.sqrt(3 * variance)  # U(-b, b) has variance b^2 / 3
            assert np.abs(values).max() > 0.9 * np.sqrt(3 * variance)
            z = values.size**0.5 * (values.var() / variance - 1) / np.sqrt(0.8)  # kurtosis 9 / 5
            assert abs(z) < 4
        elif path.endswith("/bias"):
            assert not values.any()


@pytest.mark.parametrize("init", ["torch", "xavier"])
def test_initial_weights_of_heads_for_each_task(init: Init) -> None:
    trunk = sequel_lightning.MLP((8,), 6, image_shape=(SIZE, SIZE, 3))
    net = sequel_lightning.TaskHeads(trunk, width=6, num_classes=CLASSES, num_tasks=2)
    ours = canonical_weights(initialise(net.double(), 5, init))
    model = sequel_flax.TaskHeads(sequel_flax.MLP((8,), 6), num_classes=CLASSES, num_tasks=2)
    flat = flatten_dict(initial_variables(model, spec(), 5, "float64", init)["params"], sep="/")
    assert flat.keys() == ours.keys() >= {"trunk/dense_0/kernel", "head_0/kernel", "head_1/bias"}
    for path, values in ours.items():
        np.testing.assert_array_equal(values, flat[path])
    bound = np.sqrt(6 / 16) if init == "xavier" else np.sqrt(1 / 6)
    assert 0.9 * bound < np.abs(ours["head_1/kernel"]).max() <= bound
    assert ours["head_1/bias"].any() == (init == "torch")


def test_other_initial_weights_are_for_built_in_networks() -> None:
    with pytest.raises(ValueError, match="init=xavier is for built-in networks; drop it"):
        initialise(torch.nn.Linear(2, 2), 0, "xavier")
    with pytest.raises(ValueError, match="init=kaiming is for built-in networks; drop it"):
        initial_variables(nn.Dense(CLASSES), spec(), 0, init="kaiming")
    with pytest.raises(ValueError, match="init must be torch for a model of torchvision"):
        TorchvisionHParams(init="xavier")
    with pytest.raises(ValueError, match=r"init must be one of .*lecun"):
        MLPHParams(init="lecun")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_an_experiment_sets_the_initial_weights(mode: str, tmp_path: Path) -> None:
    config = compose([f"mode={mode}", "benchmark=rotateddigits", "backbone.init=xavier", "logger=[]"]).config
    benchmark = build_benchmark(config)
    build = {"pytorch": sequel_lightning.build, "jax": sequel_flax.build}[mode]
    learner: Learner = build.build_learner(config, benchmark, tmp_path)
    weights = learner.weights()
    expected = initial_weights(0, "head/kernel", weights["head/kernel"].shape, 256, "xavier")
    np.testing.assert_allclose(weights["head/kernel"], expected, rtol=1e-6)
    assert not weights["head/bias"].any()


def test_the_published_numbers_of_parameters() -> None:
    """11,173,962 is published of ResNet-18 with 10 classes and this stem.

    By hand, of n channels and then stages of c = n, 2 n, 4 n, 8 n: the first convolution with norm 29 n, the
    first stage 4 * 9 c^2 + 4 * 2 c, each other one 9 c^2 / 2 + 3 * 9 c^2 in 3x3 kernels, c^2 / 2 in 1x1
    kernels and 5 * 2 c in norms, the head 8 n K + K.
    """

    def by_hand(n: int, num_classes: int) -> int:
        stages = sum(int(32 * c**2) + 10 * c for c in (2 * n, 4 * n, 8 * n))
        return 29 * n + 36 * n**2 + 8 * n + stages + 8 * n * num_classes + num_classes

    assert by_hand(64, 10) == 11_173_962
    assert by_hand(20, 100) == 1_109_240
    for name, num_classes, n in (("resnet18", 10, 64), ("resnet18_thin", 100, 20)):
        net = sequel_lightning.backbones.BACKBONES[name](num_classes=num_classes)
        assert sum(p.numel() for p in net.parameters()) == by_hand(n, num_classes)
        model = sequel_flax.backbones.BACKBONES[name](num_classes=num_classes)
        image = jnp.zeros((1, 32, 32, 3))
        shapes = jax.eval_shape(lambda model=model, image=image: model.init(jax.random.key(0), image))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == by_hand(n, num_classes)


# -- batch normalisation of some rows


def normalise_rows(x: FloatArray, mask: Any = None, weight: Any = None) -> Any:
    layer = BatchNorm()
    variables = jax.jit(layer.init, static_argnums=2)(jax.random.key(0), jnp.asarray(x), True)
    weight = jnp.asarray(weight)

    def total(x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = layer.apply(variables, x, False, mask, mutable=["batch_stats"])
        return (weight * y).sum(), (y, new["batch_stats"])

    gradient, (y, stats) = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
    return y, stats, gradient


def test_batch_norm_of_the_rows_that_count() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(3, 2, (6, 2, 2, 3)), rng.normal(size=(6, 2, 2, 3))
    mask = np.array([True, False, True, True, False, False])
    weight[~mask] = 0
    y, stats, gradient = normalise_rows(x, jnp.asarray(mask), weight)
    y_alone, stats_alone, gradient_alone = normalise_rows(x[mask], None, weight[mask])
    np.testing.assert_allclose(y[mask], y_alone, rtol=1e-12)
    np.testing.assert_allclose(gradient[mask], gradient_alone, rtol=1e-10, atol=1e-14)
    assert (gradient[~mask] == 0).all()
    np.testing.assert_allclose(stats["mean"], stats_alone["mean"], rtol=1e-12)
    np.testing.assert_allclose(stats["var"], stats_alone["var"], rtol=1e-12)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x[mask].var((0, 1, 2), ddof=1), rtol=1e-12)


def test_batch_norm_where_no_row_counts() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4, 2, 2, 3))
    y, stats, gradient = normalise_rows(x, jnp.zeros((4, 1, 1, 1), bool), np.zeros_like(x))
    assert np.isfinite(y).all()
    assert (gradient == 0).all()
    assert (stats["mean"] == 0).all()
    assert (stats["var"] == 1).all()


def test_batch_norm_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        normalise_rows(np.ones((1, 1, 1, 3)), None, np.ones((1, 1, 1, 3)))


# -- what does not fit


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cnn", {"max_pool": True}, r"max_pool needs stride=1.*got stride=2; set stride=1"),
        ("cnn", {"norm": "group", "norm_groups": 5}, r"=5 with channels 32, 64; use one of 1, 2, 4,"),
        ("cnn", {"activation": "swish"}, r"activation must be one of relu, .*, got 'swish'"),
        ("resnet18", {"norm": "none"}, r"norm must be one of batch, group, got 'none'"),
        ("resnet18_thin", {"norm": "group", "norm_groups": 8}, r"=8 with channels 20; use one of 1,"),
        ("cnn", {"channels": [4] * 4, "stride": 1, "max_pool": True}, r"shape \[9, 9, 3\].*conv_3 leaves"),
    ],
)
def test_settings_that_no_network_can_have(name: str, settings: Settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sequel_lightning.backbones.BACKBONES[name](**settings, image_shape=(SIZE, SIZE, 3))
    with pytest.raises(ValueError, match=words):
        initial_variables(sequel_flax.backbones.BACKBONES[name](**settings), spec(), 0)
    if "shape" not in words:
        with pytest.raises(ValueError, match=words):
            BACKBONES[name](**settings)
