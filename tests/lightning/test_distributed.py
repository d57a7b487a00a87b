"""Data-parallel training on 2 and 3 processes ends with the numbers of one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, TensorDataset

from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import OPTIMIZERS, train
from sequel_core.testing.resume import tensors
from sequel_lightning import MLP, build_optimizer, make_learner
from tests.lightning.parts import BATCH, arrays, module, trainer
from tests.lightning.parts import stream as tiny
from tests.lightning.processes import Group
from tests.parity.cases import CASES, bar, name_of

FIRST = list({hparams.name: (hparams, optimizer) for hparams, optimizer in reversed(CASES)}.values())[::-1]
"""The first case of each method."""


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    made: dict[int, Group] = {}

    def group(size: int) -> Group:
        if size not in made:
            made[size] = Group(size)
        return made[size]

    yield group
    for one in made.values():
        one.close()


def stream(hparams: AlgorithmHParams, subset: int | None) -> Benchmark:
    """Three rotations of the digits; for BiC, which corrects classes that are new, pairs of digits."""
    if hparams.name == "bic":
        return SplitDigits(num_tasks=5, scenario="class", subset=subset)
    return RotatedDigits(num_tasks=3, subset=subset)


def trained(
    hparams: AlgorithmHParams, optimizer: str, devices: int, subset: int | None, epochs: int
) -> tuple[dict[str, np.ndarray], list[list[float]]]:
    """Train with global batches of 12; return all tensors of the learner, and its scores after each task."""
    settings, changes = OPTIMIZERS[optimizer]
    benchmark = stream(hparams, subset)
    net = MLP((32, 24), benchmark.num_classes, image_shape=benchmark.spec.x.shape)
    several = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    training = TrainingHParams(
        batch_size=12, dtype="float64", seed=3, **{"epochs_per_task": epochs, **changes}
    )
    made = make_learner(
        hparams,
        net,
        build_optimizer(settings),
        benchmark,
        training,
        trainer={"accelerator": "cpu", **several},
    )
    train(made, benchmark)
    scores = [[made.evaluate(task, "test").score for task in benchmark.tasks]]
    return tensors(made), scores


one_process = cache(trained)


def check(
    group: Group, size: int, case: tuple[AlgorithmHParams, str], subset: int | None, epochs: int
) -> None:
    hparams, optimizer = case
    expected, matrix = one_process(hparams, optimizer, 1, subset, epochs)
    for actual, scores in group.do(trained, hparams, optimizer, size, subset, epochs):
        assert scores == matrix
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            size_of = np.linalg.norm(array.astype(np.float64)) or 1.0
            gap = np.linalg.norm(actual[name].astype(np.float64) - array.astype(np.float64)) / size_of
            assert gap < bar(hparams), f"{name}: {gap}"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", FIRST, ids=name_of)
@pytest.mark.slow
def test_every_method_ends_as_with_one_process(groups: Any, size: int, case: Any) -> None:
    check(groups(size), size, case, None, 2)


@pytest.mark.parametrize("name", ["er", "ewc"])
def test_two_processes_end_as_one(groups: Any, name: str) -> None:
    case = next(case for case in FIRST if case[0].name == name)
    check(groups(2), 2, case, 100, 1)


def fitted(devices: int, **options: Any) -> dict[str, np.ndarray]:
    """Fit a task with a Trainer and a DataLoader, as users do; its last batch has an odd number of rows."""
    benchmark = tiny()
    model = module(benchmark).double()
    several: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    loader = DataLoader(TensorDataset(*arrays(benchmark, 0)), BATCH - 1)
    trainer(precision="64-true", **several, **options).fit(model, loader)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_a_trainer_and_loaders_of_the_user(groups: Any) -> None:
    expected = fitted(1)
    for actual in groups(2).do(partial(fitted, use_distributed_sampler=False), 2):
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-10, err_msg=name)


def test_a_distributed_sampler_raises(groups: Any) -> None:
    with pytest.raises(AssertionError, match="got different ones, as from a DistributedSampler"):
        groups(2).do(fitted, 2)
