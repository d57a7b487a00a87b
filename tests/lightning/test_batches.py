"""What a user's loader may give: batches of other kinds and labels that are not of their task are errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import Scenario
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import ContinualModule, algorithms
from sequel_lightning.consolidation import CONSOLIDATED, IDLE
from tests.lightning.parts import (
    BATCH,
    CLASSES,
    EVERY,
    ICARL,
    KCL,
    STEPS,
    arrays,
    assert_same,
    everything,
    float_spec,
    module,
    network,
    own_loader,
    position,
    stream,
    trainer,
)

X, Y, T, _ = (*arrays(stream(), 0), None)
LENGTHS = torch.arange(len(Y)) % 30 + 20
A_BATCH = r"a batch must be \(x, y\) or \(x, y, t\), t the task index of each sample"


def fitted(model: ContinualModule, *tensors: Tensor, **options: Any) -> ContinualModule:
    trainer(**options).fit(model, DataLoader(TensorDataset(*tensors), BATCH))
    return model


@pytest.mark.parametrize("with_spec", [True, False])
@pytest.mark.parametrize(
    ("rest", "actual"),
    [
        ((Y, torch.ones(len(Y))), r"float32 \[4\]"),
        ((Y, torch.ones(len(Y), dtype=torch.bool)), r"bool \[4\]"),
        ((Y, T[:, None]), r"int64 \[4, 1\]"),
        ((Y, T, T), r"\(float32 \[4, 1, 3, 3\], int64 \[4\], int64 \[4\], int64 \[4\]\)"),
        ((), r"\(float32 \[4, 1, 3, 3\]\)"),
    ],
    ids=["weights", "flags", "column", "four", "one"],
)
def test_other_batches_raise(rest: tuple[Tensor, ...], actual: str, with_spec: bool) -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark) if with_spec else None)
    before = everything(model)["tensors"]
    with pytest.raises(ValueError, match=f"{A_BATCH}.*got .*{actual}.*collate_fn"):
        fitted(model, X, *rest)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith("net."))


def test_a_batch_that_is_no_tuple_raises() -> None:
    with pytest.raises(ValueError, match=f"{A_BATCH}.*got Tensor; leave out"):
        trainer().fit(module(stream(), NaiveHParams()), DataLoader(list(X), BATCH))  # type: ignore[arg-type]


def test_lengths_before_labels_raise() -> None:
    """(x, length, y) is not (x, y, t): lengths are no classes, and labels no task indices."""
    benchmark = stream()
    two = stream(num_tasks=5)
    for spec, message in ((benchmark.spec, "0 to 2, got 3"), (two.spec, "label 20 is not among the classes")):
        model = module(benchmark, NaiveHParams(), spec=spec._replace(x=LeafSpec(spec.image_shape, "float32")))
        with pytest.raises(ValueError, match=message):
            fitted(model, X[:BATCH], LENGTHS[:BATCH], torch.arange(BATCH))


@pytest.mark.parametrize("evaluate", ["validate", "test"])
def test_an_evaluation_checks_task_indices_too(evaluate: str) -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    for t, message in ((T + 3, "0 to 2, got 3"), (T.float(), A_BATCH)):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(), evaluate)(model, DataLoader(TensorDataset(X, Y, t), BATCH), verbose=False)
    getattr(trainer(), evaluate)(model, DataLoader(TensorDataset(X, Y, T), BATCH), verbose=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_task_indices_may_be_any_integers(dtype: torch.dtype) -> None:
    benchmark = stream(scenario="task")
    x, y, t = arrays(benchmark, 1)
    models = [module(benchmark, NaiveHParams(), spec=float_spec(benchmark)) for _ in range(2)]
    for model, indices in zip(models, (t, t.to(dtype)), strict=True):
        fitted(model, x, y, indices)
    a, b = (everything(model)["tensors"] for model in models)
    assert all(torch.equal(a[k], b[k]) for k in a)


# -- labels


@pytest.mark.parametrize(
    ("hparams", "scenario"),
    [(hparams, "task") for hparams in EVERY] + [(hparams, "class") for hparams in EVERY if hparams != KCL],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_label_of_another_task_in_the_first_batch_raises(
    hparams: AlgorithmHParams, scenario: Scenario
) -> None:
    """Nothing was trained then, and the task can begin once the loader is right."""
    benchmark = stream(scenario=scenario)
    model = module(benchmark, hparams, spec=float_spec(benchmark))
    x, y, _ = arrays(benchmark, 0)
    if isinstance(model, algorithms.KCL):
        model.keep_coreset(0, x[:4], y[:4])
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("net.")}
    wrong = y.clone()
    wrong[2] = 5
    with pytest.raises(ValueError, match=r"label 5 is not among the classes of task 0, \[0, 1\]; relabel"):
        fitted(model, x, wrong)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    twin = module(benchmark, hparams, spec=float_spec(benchmark))
    if isinstance(twin, algorithms.KCL):
        twin.keep_coreset(0, x[:4], y[:4])
    assert position(fitted(model, x, y)) == position(fitted(twin, x, y)) == (0, CONSOLIDATED)
    a, b = everything(model)["tensors"], everything(twin)["tensors"]
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("label", [CLASSES, -1, -100])
def test_a_label_outside_the_head_raises(label: int) -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    y = Y.clone()
    y[0] = label
    message = (
        rf"label {label} is not among the classes of task 0, \[0, 1, 2, 3\] and outside the head, 0 to 3;"
    )
    with pytest.raises(ValueError, match=message):
        fitted(model, X, y)


def test_labels_must_be_integers() -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    with pytest.raises(ValueError, match=r"labels must be an integer tensor \[B\], got float32 \[4, 4\]"):
        fitted(model, X, torch.eye(CLASSES)[Y])


@pytest.mark.parametrize("hparams", [NaiveHParams(), EWCHParams()], ids=["naive", "ewc"])
@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("steps", [None, 5], ids=["at the report", "without a report"])
def test_a_label_of_another_task_in_a_later_batch_ends_the_fit(
    hparams: AlgorithmHParams, scenario: Scenario, steps: int | None
) -> None:
    """Masked, its loss is 3.4e38 / B, which is finite; in the class scenario it is an ordinary number."""
    benchmark = stream(scenario=scenario)
    model = module(benchmark, hparams, spec=float_spec(benchmark))
    x, y, t = arrays(benchmark, 0)
    y[BATCH + 1] = 3
    one: Any = trainer(**({"max_steps": steps} if steps else {}))
    if steps:
        one.log_every_n_steps = 1000
    with pytest.raises(ValueError, match=r"label 3 is not among the classes of task 0, \[0, 1\]; relabel"):
        one.fit(model, DataLoader(TensorDataset(x, y, t), BATCH))
    assert model.running_metrics.steps_done == (steps or 2)


def test_labels_of_their_own_tasks_are_fine() -> None:
    """Rehearsal by the user, with each sample's task; iCaRL takes samples of past tasks without it."""
    benchmark = stream(scenario="class")
    x, y, t = (torch.cat(pair) for pair in zip(arrays(benchmark, 0), arrays(benchmark, 1), strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    fitted(model, x, y, t)
    assert position(model) == (0, CONSOLIDATED)
    model = module(benchmark, ICARL, spec=float_spec(benchmark))
    trainer().fit(model, own_loader(benchmark, 0, with_task=False))
    fitted(model, x[order], y[order])
    assert position(model) == (1, CONSOLIDATED)
    model = module(benchmark, ICARL, spec=float_spec(benchmark))
    with pytest.raises(ValueError, match=r"label [23] is not among the classes of task 0, \[0, 1\]; relabel"):
        fitted(model, x[order], y[order])
    assert position(model)[1] != IDLE


def test_a_loss_that_is_not_finite_is_warned_of_once() -> None:
    benchmark = stream()
    model = module(benchmark, NaiveHParams(), partial(torch.optim.SGD, lr=1e30), spec=float_spec(benchmark))
    net = network(benchmark)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e30)
    bad: list[int] = []
    for step, (x, y) in enumerate(own_loader(benchmark, 0, with_task=False)):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        bad += [step] if not bool(loss.isfinite()) else []
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 < bad[0] < STEPS
    message = f"the training loss is no longer finite at task 0, step {bad[0]}; lower the learning rate"
    with pytest.warns(UserWarning, match=message) as actual:
        trainer(2).fit(model, own_loader(benchmark, 0, with_task=False))
    assert len([w for w in actual if "no longer finite" in str(w.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_narrow_integers_are_labels_too(dtype: torch.dtype) -> None:
    """Any integers train as int64 does, with and without task indices."""
    benchmark = stream()
    for rest in ((), (T,)):
        options: dict[str, Any] = {"spec": float_spec(benchmark)}
        expected = fitted(module(benchmark, EWCHParams(), **options), X, Y, *rest)
        actual = fitted(module(benchmark, EWCHParams(), **options), X, Y.to(dtype), *rest)
        assert_same(everything(actual), everything(expected))


@pytest.mark.parametrize("y", [Y.float(), torch.eye(CLASSES)[Y], Y[:, None], Y > 1])
def test_labels_must_be_integers_without_a_spec_too(y: Tensor) -> None:
    model = module(stream(), EWCHParams(), spec=None)
    with pytest.raises(ValueError, match=r"labels must be an integer tensor \[B\], got .*; for other"):
        fitted(model, X, y)


@pytest.mark.parametrize("evaluate", ["validate", "test"])
def test_an_evaluation_names_a_label_whose_logit_is_masked(evaluate: str) -> None:
    """Batches without task indices belong to the current task: a loader of another one would score 0."""
    benchmark = stream(scenario="task")
    model = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    for task in range(2):
        trainer().fit(model, own_loader(benchmark, task, with_task=False))
    run = getattr(trainer(), evaluate)
    wrong = r"label \d is not among the classes of task 1, \[2, 3\].*\(x, y, t\)"
    with pytest.raises(ValueError, match=wrong):
        run(model, own_loader(benchmark, 0, with_task=False), verbose=False)
    given = run(model, own_loader(benchmark, 0, with_task=True), verbose=False)[0]
    assert given[f"{'val' if evaluate == 'validate' else 'test'}/loss"] < 100
