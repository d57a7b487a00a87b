"""Data-parallel training on 2 and 3 processes ends with the numbers of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core import run
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import OPTIMIZERS, SILENT
from sequel_core.testing.resume import tensors
from sequel_lightning import MLP, Naive, build_optimizer, make_learner, replay
from tests.lightning.parts import BATCH, CLASSES, SIDE, arrays, data, float_spec, learn, module, trainer
from tests.lightning.parts import stream as tiny
from tests.lightning.processes import Group, groups_of_a_file
from tests.parity.cases import CASES, bar, name_of

FIRST = list({hparams.name: (hparams, optimizer) for hparams, optimizer in reversed(CASES)}.values())[::-1]
"""The first case of each method."""


groups = groups_of_a_file()


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
    scores = []
    for task in hparams.training_tasks(benchmark, training.seed):
        made.fit_task(task, SILENT)
        scores.append([made.evaluate(each, "test").score for each in benchmark.tasks])
    return tensors(made), scores


one_process = cache(trained)


def check(
    group: Group, size: int, case: tuple[AlgorithmHParams, str], subset: int | None, epochs: int
) -> None:
    hparams, optimizer = case
    expected, matrix = one_process(hparams, optimizer, 1, subset, epochs)
    results = group.do(trained, hparams, optimizer, size, subset, epochs)
    for actual, scores in results:
        assert scores == matrix
        assert actual.keys() == expected.keys()
        for name, array in results[0][0].items():
            np.testing.assert_array_equal(actual[name], array, err_msg=name)
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


def fitted(
    hparams: AlgorithmHParams, devices: int, batch_size: int, order: str = "same", count: int = 21
) -> dict[str, np.ndarray]:
    """Fit a task for two epochs with a Trainer and a loader of `(x, y)`, as users do."""
    benchmark = tiny()
    model = module(benchmark, hparams, spec=float_spec(benchmark)).double()
    several: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    x, y, _ = arrays(benchmark, 0)
    samples: Any = TensorDataset(x[:count], y[:count])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    sampler: Any = DistributedSampler(samples, devices, rank, shuffle=order == "shuffled")
    if order == "same":
        loader = DataLoader(samples, batch_size)
    elif order == "batch sampler":
        loader = DataLoader(samples, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False))
    elif order == "lists":
        loader = DataLoader(samples, batch_sampler=Lists(sampler, batch_size))
    else:
        loader = DataLoader(samples, batch_size, sampler=sampler)
    several |= {"precision": "64-true", "use_distributed_sampler": False}
    trainer(2, **several).fit(model, loader, loader)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


class Lists:
    """A batch sampler of a user, without a batch size."""

    def __init__(self, sampler: Any, count: int) -> None:
        self.sampler, self._count = sampler, count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.tensor(list(self.sampler)).split(self._count))

    def __len__(self) -> int:
        return -(-len(self.sampler) // self._count)


EWC, SMALL = EWCHParams(ewc_lambda=10.0), ERHParams(mem_size=9, mem_batch_size=6)


@pytest.mark.parametrize(
    ("hparams", "size", "share", "order", "count"),
    [
        (EWC, 2, 3, "same", 21),
        (EWC, 2, 3, "in order", 21),  # each process has three rows of a batch of six
        (SMALL, 2, 3, "shuffled", 21),
        (SMALL, 2, 1, "in order", 21),  # the last batch has one sample, and a copy of another
        (SMALL, 2, 3, "batch sampler", 21),
        (SMALL, 3, 2, "shuffled", 20),
        (EWC, 3, 1, "shuffled", 19),  # and two copies
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_trainer_and_loaders_of_the_user(
    groups: Any, hparams: Any, size: int, share: int, order: str, count: int
) -> None:
    batch_size = share if order == "same" else share * size
    expected = fitted(hparams, 1, batch_size, order, count)
    results = groups(size).do(fitted, hparams, size, share, order, count)
    for actual in results:
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-10, err_msg=name)
            np.testing.assert_array_equal(actual[name], results[0][name], err_msg=name)


def test_a_batch_sampler_without_a_batch_size_raises(groups: Any) -> None:
    message = (
        "ValueError: the batch sampler of a loader with a DistributedSampler needs batch_size, .* got a Lists"
    )
    with pytest.raises(AssertionError, match=message):
        groups(2).do(fitted, EWC, 2, 3, "lists")


def scored() -> float:
    """Fit ER on images of one colour, and test it with another Trainer of two devices."""
    benchmark = tiny()
    model = module(benchmark, ERHParams(mem_size=9, mem_batch_size=6))
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    learn(model, benchmark, 0, **options)
    return trainer(**options).test(model, data(benchmark, 0), verbose=False)[0]["test/accuracy"]


def test_a_replay_method_is_tested_on_two_devices(groups: Any) -> None:
    benchmark = tiny()
    model = module(benchmark, ERHParams(mem_size=9, mem_batch_size=6))
    learn(model, benchmark, 0)
    (scores,) = trainer().test(model, data(benchmark, 0), verbose=False)
    assert groups(2).do(scored) == [scores["test/accuracy"]] * 2


def accuracy(devices: int, batch_size: int) -> float:
    """Return the accuracy of an untrained network on an odd number of samples."""
    benchmark = tiny()
    model = module(benchmark)
    x, y, _ = arrays(benchmark, 0)
    several: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    loader = DataLoader(TensorDataset(x[:-1], y[:-1]), batch_size)
    return trainer(**several).test(model, loader, verbose=False)[0]["test/accuracy"]


def test_a_distributed_sampler_repeats_no_sample_of_a_test(groups: Any) -> None:
    assert groups(2).do(accuracy, 2, 5) == [accuracy(1, 10)] * 2


def fitted_with_batches_of_each_rank() -> None:
    """Fit a task; the second process has the samples in another order."""
    benchmark = tiny()
    x, y, _ = arrays(benchmark, 0)
    order = torch.arange(len(y)).roll(int(os.environ["LOCAL_RANK"]))
    loader = DataLoader(TensorDataset(x[order], y[order]), BATCH)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer(**options).fit(module(benchmark), loader)


def test_batches_that_differ_raise(groups: Any) -> None:
    with pytest.raises(AssertionError, match="batches must be the same in every process, or their loader"):
        groups(2).do(fitted_with_batches_of_each_rank)


def fitted_with_a_size_of_each_rank() -> None:
    """Fit ER, with a larger memory in the second process."""
    benchmark = tiny()
    model = module(benchmark, ERHParams(mem_size=9 + int(os.environ["LOCAL_RANK"]), mem_batch_size=6))
    learn(model, benchmark, 0, devices=2, strategy="ddp", use_distributed_sampler=False)


def run_with_a_seed_of_each_rank(folder: Path) -> None:
    """Run naive finetuning, with another seed in the second process."""
    digits = RotatedDigits(num_tasks=2, subset=20)
    net = MLP((8,), digits.num_classes, image_shape=digits.image_shape)
    training = TrainingHParams(seed=int(os.environ["LOCAL_RANK"]))
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    sgd = partial(torch.optim.SGD, lr=0.1)
    run(
        make_learner(NaiveHParams(), net, sgd, digits, training, trainer=options),
        digits,
        run_dir=folder / os.environ["LOCAL_RANK"],
        progress=False,
    )


def test_settings_that_differ_between_processes_raise(groups: Any, tmp_path: Path) -> None:
    message = "ValueError: settings must be the same in every process, got {} in processes 0 and 1"
    with pytest.raises(AssertionError, match=message.format("algo.mem_size=9 and 10")):
        groups(2).do(fitted_with_a_size_of_each_rank)
    with pytest.raises(AssertionError, match=message.format("training.seed=0 and 1")):
        groups(2).do(run_with_a_seed_of_each_rank, tmp_path)
    assert not list(tmp_path.iterdir())


def replayed() -> tuple[set[bytes], np.ndarray]:
    """Train ER on two tasks; return the images that are drawn from the memory, and the memory at the end."""
    drawn: set[bytes] = set()
    read = replay.read

    def noted(memory: replay.Memory, slots: Any) -> replay.ReplayBatch:
        samples = read(memory, slots)
        drawn.update(image.tobytes() for image in samples.x.numpy())
        return samples

    devices = int(os.environ.get("WORLD_SIZE", "1"))
    several: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    benchmark = tiny(steps=20)
    model: Any = module(benchmark, ERHParams(mem_size=9, mem_batch_size=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "read", noted)
        for task in (0, 1):
            learn(model, benchmark, task, use_distributed_sampler=False, **several)
    return drawn, model.state.x.numpy()


@pytest.mark.slow
def test_four_processes_replay_the_samples_of_one(groups: Any) -> None:
    drawn, memory = replayed()
    results = groups(4).do(replayed)
    assert len(set.union(*(images for images, _ in results))) == len(drawn) > len(memory) == 9
    for images, kept in results:
        assert images == drawn
        np.testing.assert_array_equal(kept, memory)


WIDTH, LR, ROWS = 6, 0.1, 9


def normalised_net() -> nn.Module:
    """Return a network with batch normalisation, in float64."""
    torch.manual_seed(0)
    layers = nn.Linear(SIDE * SIDE, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(nn.Flatten(), *layers).double()


def fitted_with_batch_norm(**more: Any) -> dict[str, np.ndarray]:
    benchmark = tiny()
    sgd = partial(torch.optim.SGD, lr=LR)
    model = Naive(normalised_net(), sgd, NaiveHParams(), float_spec(benchmark))
    loader = DataLoader(TensorDataset(*arrays(benchmark, 0)), ROWS)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer(precision="64-true", **options, **more).fit(model, loader)
    return {name: tensor.numpy() for name, tensor in model.net.state_dict().items()}


def reference_of_two_ranks() -> dict[str, np.ndarray]:
    """Train by hand; each of two ranks normalises its rows. If one is missing, the last row is repeated."""
    net = {name: tensor.numpy().copy() for name, tensor in normalised_net().state_dict().items()}
    images, labels, _ = (a.numpy() for a in arrays(tiny(), 0))
    flat = images.reshape(len(images), -1).astype(np.float64)
    for first in range(0, len(flat), ROWS):
        x, y = flat[first : first + ROWS], labels[first : first + ROWS]
        total = {name: np.zeros_like(array) for name, array in net.items()}
        for rank in (0, 1):
            rows = np.arange(rank, len(x) + len(x) % 2, 2)
            real = (rows < len(x))[:, None]
            rows = rows.clip(max=len(x) - 1)
            h = x[rows] @ net["1.weight"].T + net["1.bias"]
            mean, variance = h.mean(0), h.var(0)
            scale = 1 / np.sqrt(variance + 1e-5)
            z = (h - mean) * scale
            a = z * net["2.weight"] + net["2.bias"]
            logits = a @ net["3.weight"].T + net["3.bias"]
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            g = (p - np.eye(CLASSES)[y[rows]]) * real / len(x)
            g_a = g @ net["3.weight"]
            g_z = g_a * net["2.weight"]
            g_h = scale * (g_z - g_z.mean(0) - z * (g_z * z).mean(0))
            total["3.weight"] += g.T @ a
            total["3.bias"] += g.sum(0)
            total["2.weight"] += (g_a * z).sum(0)
            total["2.bias"] += g_a.sum(0)
            total["1.weight"] += g_h.T @ x[rows]
            total["1.bias"] += g_h.sum(0)
            total["2.running_mean"] += mean / 2
            total["2.running_var"] += h.var(0, ddof=1) / 2
        for name, value in total.items():
            if name.startswith("2.running"):
                net[name] = 0.9 * net[name] + 0.1 * value
            elif name != "2.num_batches_tracked":
                net[name] = net[name] - LR * value
    return net


def test_batch_normalisation_uses_the_rows_of_each_process(groups: Any) -> None:
    expected = reference_of_two_ranks()
    for actual in groups(2).do(fitted_with_batch_norm):
        for name, array in expected.items():
            if name != "2.num_batches_tracked":
                np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-12, err_msg=name)


def test_synchronised_batch_normalisation_needs_a_gpu(groups: Any) -> None:
    with pytest.raises(AssertionError, match=r"got accelerator=cpu; set sync_batchnorm=False of the Trainer"):
        groups(2).do(partial(fitted_with_batch_norm, sync_batchnorm=True))
