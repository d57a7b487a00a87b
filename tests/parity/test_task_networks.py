"""Networks that take the task of each sample: parity, and the setting that says that it is given."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import sequel_flax
import sequel_lightning
from sequel_core import Batch
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT, difference, training
from sequel_core.testing.parity import stream as benchmark

WIDTHS, FEATURES = (16,), 12
GIVEN: dict[str, Any] = {"task_given": True}
MEMORY: dict[str, Any] = {"mem_size": 50, "mem_batch_size": 9}
METHODS: list[AlgorithmHParams] = [
    NaiveHParams(**GIVEN),
    EWCHParams(ewc_lambda=20, fisher_samples=101, **GIVEN),
    ERHParams(**MEMORY, **GIVEN),
    DERppHParams(**MEMORY, **GIVEN),
    DERHParams(**MEMORY, **GIVEN),
    SIHParams(si_lambda=0.3, **GIVEN),
    MASHParams(mas_lambda=0.01, mas_samples=50, **GIVEN),
    AGEMHParams(memory="task_quota", mem_size=60, mem_batch_size=9, **GIVEN),
    MCSGDHParams(mem_size=60, lmc_batch_size=16, lmc_lr=0.02, **GIVEN),
    LaMAMLHParams(mem_size=50, glances=1, mem_batch_size=6, n_inner_updates=1, **GIVEN),
]
DEFAULT = (3,)  # the others take long


def torch_net(stream: Benchmark) -> torch.nn.Module:
    trunk = sequel_lightning.MLP(WIDTHS, FEATURES, image_shape=stream.image_shape)
    return sequel_lightning.TaskHeads(trunk, FEATURES, stream.num_classes, len(stream))


def flax_net(stream: Benchmark) -> nn.Module:
    return sequel_flax.TaskHeads(sequel_flax.MLP(WIDTHS, FEATURES), stream.num_classes, len(stream))


def learners(hparams: AlgorithmHParams, scenario: Scenario = "domain") -> tuple[Any, Any]:
    stream, optimizer = benchmark(scenario), OptimizerHParams(lr=0.02, momentum=0.9)
    ours = sequel_lightning.make_learner(
        hparams, torch_net(stream), sequel_lightning.build_optimizer(optimizer), stream, training()
    )
    theirs = sequel_flax.make_learner(
        hparams,
        flax_net(stream),
        sequel_flax.build_optimizer(optimizer),
        stream,
        training(),
        steps_per_call=1,
    )
    return ours, theirs


@pytest.mark.parametrize(
    "hparams",
    [
        pytest.param(hparams, id=hparams.name, marks=[] if k in DEFAULT else [pytest.mark.slow])
        for k, hparams in enumerate(METHODS)
    ],
)
def test_both_frameworks_train_a_head_for_each_task_alike(hparams: AlgorithmHParams) -> None:
    ours, theirs = learners(hparams)
    initial = ours.weights()
    assert difference(initial, theirs.weights()) == 0
    for task in benchmark("domain").tasks:
        ours.fit_task(task, SILENT)
        theirs.fit_task(task, SILENT)
        if hparams.name == "naive":
            later = [f"head_{k}/kernel" for k in range(task.index + 1, 3)]
            assert all(np.array_equal(ours.weights()[name], initial[name]) for name in later)
    assert difference(ours.weights(), theirs.weights()) < 1e-10
    assert min(np.abs(a - initial[name]).max() for name, a in ours.weights().items()) > 1e-3
    test = benchmark("domain").tasks[1]
    a, b = (learner.evaluate(test, "test") for learner in (ours, theirs))
    assert a.score == b.score
    x, _, _ = test.test.take(np.arange(40))
    with torch.no_grad():
        images = torch.from_numpy(x).movedim(-1, 1)
        logits = [ours.module.eval().predict(images, torch.full((40,), k)) for k in range(3)]
    assert (logits[1] - logits[0]).abs().max() > 1e-3  # the heads differ


def test_the_task_scenario_gives_the_task() -> None:
    ours, theirs = learners(NaiveHParams(), "task")
    for task in benchmark("task").tasks[:2]:
        ours.fit_task(task, SILENT)
        theirs.fit_task(task, SILENT)
    assert difference(ours.weights(), theirs.weights()) < 1e-10


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_a_network_that_takes_the_task_needs_the_setting(scenario: Scenario) -> None:
    stream = benchmark(scenario)
    message = r"task_given must be true, got false; set NaiveHParams\(task_given=True\)"
    with pytest.raises(ValueError, match=message):
        sequel_lightning.Naive(torch_net(stream), torch.optim.SGD, NaiveHParams(), stream.spec)
    with pytest.raises(ValueError, match=message):
        sequel_lightning.Naive(torch_net(stream), torch.optim.SGD)
    net = flax_net(stream)
    ts = TrainState.create(
        apply_fn=net.apply, params=sequel_flax.initial_params(net, stream.spec, 0), tx=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match=message):
        sequel_flax.naive(NaiveHParams()).init(ts, stream.spec)
    assert sequel_flax.naive(NaiveHParams(**GIVEN)).init(ts, stream.spec)
    module = sequel_lightning.Naive(
        torch_net(stream), torch.optim.SGD, NaiveHParams(**GIVEN), stream.spec
    ).double()
    with pytest.raises(ValueError, match="needs the task index of each sample here"):
        module(torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "hparams", [ICaRLHParams(**GIVEN), LFLHParams(**GIVEN), KCLHParams(**GIVEN)], ids=lambda h: h.name
)
def test_methods_that_use_features_reject_it(hparams: Any) -> None:
    stream = benchmark("domain")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def features(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return self.head(self.features(x)) + t[:, None]

    message = f"{hparams.name} uses .* so it cannot train a network that takes the task"
    with pytest.raises(ValueError, match=message):
        sequel_lightning.ALGORITHMS[hparams.name](Net(), torch.optim.SGD, hparams, stream.spec)
    net = flax_net(stream)
    algorithm = sequel_flax.ALGORITHMS[hparams.name](hparams)
    params = sequel_flax.initial_params(net, stream.spec, 0)
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        algorithm.init(algorithm.prepare(ts, stream.spec), stream.spec)


class Scaled(nnx.Module):
    """Logits whose scale depends on the task."""

    def __init__(self) -> None:
        self.head = nnx.Linear(64, 10, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.head(x.reshape(len(x), -1)) * (t + 1)[:, None]


class CompactScaled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, deterministic: bool = True) -> jax.Array:
        return nn.Dense(10)(x.reshape(len(x), -1)) * (t + 1)[:, None]


@pytest.mark.parametrize(
    ("net", "trainable"),
    [(Scaled(), None), (CompactScaled(), lambda path: path[-1] == "kernel")],
    ids=["nnx", "linen-kernel"],
)
def test_every_module_of_flax_gets_the_task(net: Any, trainable: Any) -> None:
    stream = benchmark("domain")
    hparams = ERHParams(**MEMORY, **GIVEN)
    learner = sequel_flax.make_learner(
        hparams, net, optax.sgd(0.01), stream, training(), steps_per_call=1, trainable=trainable
    )
    learner.fit_task(stream.tasks[0], SILENT)
    x = jnp.asarray(stream.tasks[0].test.take(np.arange(5)).x)
    logits = [learner.algorithm.predict(learner.ts, learner.state, x, jnp.full(5, k)) for k in (0, 2)]
    np.testing.assert_allclose(logits[1], 3 * np.asarray(logits[0]))


def test_an_optional_task_is_passed_only_if_it_is_given() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> Any:
            logits = self.head(x.flatten(1))
            return logits if t is None else logits + t[:, None]

    spec, net = benchmark("domain").spec, Net()
    make = partial(sequel_lightning.Naive, net, torch.optim.SGD, spec=spec)
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 2])
    plain, given = make(NaiveHParams())(x, t), make(NaiveHParams(**GIVEN))(x, t)
    torch.testing.assert_close(given - plain, torch.tensor([[0.0], [2.0]]).expand(2, 10))


def test_an_input_named_t_is_not_the_task() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
            return nn.Dense(2)(jnp.concatenate([x, t], axis=1))

    from sequel_benchmarks import from_arrays

    arrays = {"x": np.ones((20, 3), np.float32), "t": np.ones((20, 2), np.float32)}, np.arange(20) % 2
    stream, net = from_arrays([(arrays, arrays)], scenario="domain"), Net()
    params = sequel_flax.initial_params(net, stream.spec, 0)
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    algorithm = sequel_flax.naive(NaiveHParams())
    ts, state = algorithm.start_task(ts, algorithm.init(ts, stream.spec), stream.tasks[0])
    batch = Batch(*stream.tasks[0].train.take(np.arange(4)))
    assert np.isfinite(algorithm.train_step(ts, state, batch)[2]["loss"])
