"""Networks that get new parameters at the start of a task: in both frameworks, resuming, and errors."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax.training.train_state import TrainState
from torch.utils.data import DataLoader

import sequel_flax
import sequel_lightning
from sequel_core import Batch
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.trees import LeafSpec
from sequel_core.testing.parity import SILENT, difference
from sequel_core.testing.streams import table
from tests.lightning.parts import At, assert_same, everything, trainer

WIDTH, BATCH, STEPS, TASKS = 8, 5, 70, 3
SPEC = StreamSpec(LeafSpec((6,), "float64"), 3, TASKS, "domain", np.ones((TASKS, 3), bool))
CARRY: dict[str, Any] = {"reset_optimizer": False}


class Adapted(torch.nn.Module):
    """A hidden layer with one more linear map for each task, zero at first; and a head."""

    def __init__(self, features: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.stem, self.head = torch.nn.Linear(features, WIDTH), torch.nn.Linear(WIDTH, outputs)

    def start_task(self, task: int) -> None:
        adapter = torch.nn.Linear(self.stem.in_features, WIDTH, bias=False)
        torch.nn.init.zeros_(adapter.weight)
        self.add_module(f"adapter_{task}", adapter)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        adapters = [layer for name, layer in self.named_children() if name.startswith("adapter")]
        return torch.tanh(sum((layer(x) for layer in adapters), self.stem(x)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.features(x))


class FlaxAdapted(nn.Module):
    num_adapters: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        TRACES.append(self.num_adapters)
        h = nn.Dense(WIDTH, name="stem")(x)
        for k in range(self.num_adapters):
            h = h + nn.Dense(WIDTH, False, kernel_init=nn.initializers.zeros, name=f"adapter_{k}")(x)
        return nn.Dense(3, name="head")(jnp.tanh(h))


TRACES: list[int] = []


@cache
def batches(task: int) -> list[Batch]:
    rng = np.random.default_rng(task)
    x = rng.normal(size=(STEPS, BATCH, 6)) + task
    y = rng.integers(0, 3, (STEPS, BATCH))
    return [Batch(a, b, np.full(BATCH, task)) for a, b in zip(x, y, strict=True)]


def loader(task: int) -> DataLoader[Any]:
    samples = [tuple(torch.as_tensor(a) for a in batch[:3]) for batch in batches(task)]
    return DataLoader(samples, batch_size=None)  # type: ignore[arg-type]


def torch_module(hparams: AlgorithmHParams, spec: StreamSpec | None = None, lr: float = 0.05) -> Any:
    torch.manual_seed(0)
    net = Adapted().double() if spec is None else Adapted(spec.input_shape[0], spec.num_classes)
    return sequel_lightning.ALGORITHMS[hparams.name](
        net, partial(torch.optim.SGD, lr=lr, momentum=0.9), hparams, spec
    )


def flax_params(net: torch.nn.Module) -> dict[str, Any]:
    flat = sequel_lightning.backbones.canonical_weights(net)
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        layer, name = path.split("/")
        tree.setdefault(layer, {})[name] = jnp.asarray(array)
    return tree


def flat_weights(params: Any) -> dict[str, Any]:
    return {f"{layer}/{name}": np.asarray(p) for layer, tree in params.items() for name, p in tree.items()}


METHODS = [
    NaiveHParams(),
    EWCHParams(ewc_lambda=5, fisher_samples=None),
    EWCHParams(ewc_lambda=5, accumulation="online", gamma=0.8, fisher_samples=100),
    SIHParams(si_lambda=0.3),
    MASHParams(mas_lambda=0.01),
]


@pytest.mark.parametrize(
    "hparams",
    [
        pytest.param(hparams, id=f"{hparams.name}-{k}", marks=[] if k == 1 else [pytest.mark.slow])
        for k, hparams in enumerate(METHODS)
    ],
)
def test_both_frameworks_train_a_growing_network_alike(hparams: AlgorithmHParams) -> None:
    module = torch_module(hparams)
    algorithm = sequel_flax.ALGORITHMS[hparams.name](hparams)
    net = FlaxAdapted(1)
    ts = TrainState.create(
        apply_fn=net.apply, params=flax_params(module.net), tx=optax.sgd(0.05, momentum=0.9)
    )
    state, step, compilations = algorithm.init(ts, SPEC), jax.jit(algorithm.train_step), []
    for k in range(TASKS):
        if k:
            net = FlaxAdapted(k + 1)
            new = jax.tree.map(jnp.float64, net.init(jax.random.key(k), jnp.zeros((1, 6)))["params"])
            ts = ts.replace(apply_fn=net.apply, params={**new, **ts.params})
        ts, state = algorithm.start_task(ts, state, FakeTask(k))
        if hasattr(state.memory, "importance"):
            importance = flat_weights(state.memory.importance)
            assert not importance[f"adapter_{k}/kernel"].any()
            assert k == 0 or importance["adapter_0/kernel"].any()
        compiled = []
        for batch in batches(k):
            TRACES.clear()
            ts, state, _ = step(ts, state, batch)
            compiled.append(bool(TRACES))
        compilations.append(compiled)
        ts, state = algorithm.end_task(ts, state, batches(k))
        trainer(1, precision="64-true").fit(module, loader(k))
        weights = sequel_lightning.backbones.canonical_weights(module.net)
        distance = difference(weights, flat_weights(ts.params))
        assert distance < 1e-10
    assert (
        float(np.abs(flat_weights(ts.params)["adapter_2/kernel"]).max()) > 1e-3
    )  # trained in its first task
    assert compilations == [[True, *[False] * (STEPS - 1)]] * TASKS  # one for each growth


class FakeTask:
    def __init__(self, index: int) -> None:
        self.index = index


def test_a_parameter_that_changes_its_shape_is_named() -> None:
    algorithm, net = sequel_flax.ewc(EWCHParams()), FlaxAdapted(1)
    params = flax_params(torch_module(NaiveHParams()).net)
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    ts, state = algorithm.start_task(ts, algorithm.init(ts, SPEC), FakeTask(0))
    ts, state = algorithm.end_task(ts, state, batches(0)[:2])
    wider = {**ts.params, "head": {"kernel": jnp.zeros((WIDTH, 4)), "bias": jnp.zeros(4)}}
    with pytest.raises(ValueError, match=r"head/bias must keep its shape .* got \[4\] after \[3\]"):
        algorithm.start_task(ts.replace(params=wider), state, FakeTask(1))

    class Widened(Adapted):
        def start_task(self, task: int) -> None:
            if task:
                self.head = torch.nn.Linear(WIDTH, 4)

    module = sequel_lightning.Naive(Widened().double(), partial(torch.optim.SGD, lr=0.1))
    trainer(1, precision="64-true").fit(module, loader(0))
    with pytest.raises(
        ValueError, match=r"head.weight must keep its shape .* got \[4, 8\] after \[3, 8\] in Wi"
    ):
        trainer(1, precision="64-true").fit(module, loader(1))


DEFAULT = ("ewc", "lfl", "er")  # the others take long
RESUMED = [
    NaiveHParams(**CARRY),
    EWCHParams(ewc_lambda=5, fisher_samples=50, **CARRY),
    SIHParams(si_lambda=0.3),
    MASHParams(mas_lambda=0.01, mas_samples=50),
    LFLHParams(lfl_lambda=0.1),
    ERHParams(mem_size=20, mem_batch_size=5),
    ICaRLHParams(mem_size=12),
    MCSGDHParams(mem_size=21, lmc_batch_size=5),
]


@pytest.mark.parametrize(
    "hparams",
    [
        pytest.param(hparams, id=hparams.name, marks=[] if hparams.name in DEFAULT else [pytest.mark.slow])
        for hparams in RESUMED
    ],
)
def test_a_checkpoint_of_a_later_task_resumes_in_a_new_module(
    hparams: AlgorithmHParams, tmp_path: Path
) -> None:
    """Bit-identical, from within the second task."""
    stream = table("classes", train=60)
    data = [sequel_lightning.TaskDataModule(task, BATCH) for task in stream.tasks]
    module, resumed = (torch_module(hparams, stream.spec) for _ in range(2))
    trainer(1).fit(module, datamodule=data[0])
    file = tmp_path / "9.ckpt"
    save = At(lambda fit, _: fit.save_checkpoint(file), "on_train_batch_end", step=9)
    trainer(1, callbacks=[save]).fit(module, datamodule=data[1])
    assert module.net.adapter_1.weight.any()
    trainer(1).fit(resumed, datamodule=data[1], ckpt_path=str(file), weights_only=True)
    assert_same(everything(resumed), everything(module))
    for one in (module, resumed):
        trainer(1).fit(one, datamodule=data[2])
    assert_same(everything(resumed), everything(module))


def test_a_learner_restores_a_network_that_has_grown(tmp_path: Path) -> None:
    stream = table("classes", train=40)
    ends = []
    for restored in (False, True):
        learners = [made(stream) for _ in range(2)]
        first, second = learners if restored else learners[:1] * 2
        for task in stream.tasks[:2]:
            first.fit_task(task, SILENT)
        if restored:
            first.save(tmp_path)()
            second.restore(tmp_path)
        second.fit_task(stream.tasks[2], SILENT)
        ends.append(second.weights())
    assert "adapter_2/kernel" in ends[0]
    assert difference(*ends) == 0


def made(stream: Any) -> Any:
    torch.manual_seed(0)
    return sequel_lightning.make_learner(
        EWCHParams(ewc_lambda=5),
        Adapted(stream.spec.input_shape[0], stream.num_classes),
        sequel_lightning.build_optimizer(OptimizerHParams(lr=0.1)),
        stream,
        TrainingHParams(batch_size=5),
    )
