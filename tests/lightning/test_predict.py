"""`trainer.predict`, and logits without task indices."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch
from tests.lightning.parts import (
    ICARL,
    KCL,
    MCSGD,
    data,
    every_algorithm,
    learn,
    module,
    own_stream,
    stream,
    trainer,
)


def as_named(rows: Any) -> Batch:
    return Batch(*map(torch.stack, zip(*rows, strict=True)))


@every_algorithm
def test_predict_returns_the_logits_of_the_test_samples(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams)
    model = module(benchmark, hparams)
    learn(model, benchmark, 0)
    actual: Any = trainer().predict(model, data(benchmark, 0, eval_batch_size=10))
    assert [len(part) for part in actual] == [10, 10, 3]
    split = benchmark.tasks[0].test
    samples = split.take(np.arange(len(split)))
    x, t = torch.from_numpy(samples.x).movedim(-1, 1), torch.from_numpy(samples.t)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(actual), model.predict(x, t), rtol=1e-5, atol=1e-6)
        if hparams.name not in ("icarl", "kcl"):  # the others predict with the network
            torch.testing.assert_close(torch.cat(actual), model.net(model.normalise(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("hparams", [EWCHParams(), ICARL, MCSGD], ids=lambda hparams: hparams.name)
def test_every_form_of_a_batch_gives_the_same_without_t(hparams: AlgorithmHParams, scenario: Any) -> None:
    benchmark = stream(2, scenario)
    model = module(benchmark, hparams)
    learn(model, benchmark, 0)
    split = benchmark.tasks[0].test
    samples = split.take(np.arange(len(split)))
    x, y, t = torch.from_numpy(samples.x).movedim(-1, 1), *map(torch.from_numpy, samples[1:])
    model.eval()
    with torch.no_grad():
        expected, logits = model.predict(x, t), model(x, t)
        assert torch.equal(model(x), logits)
        assert torch.equal(model.predict(x), expected)
        for name, other in model.alternatives(x, t).items():
            assert torch.equal(model.alternatives(x)[name], other)
    whole = len(x)
    loaders = [
        DataLoader(list(x), whole),  # type: ignore[arg-type]  # a data set of inputs alone
        DataLoader(TensorDataset(x), whole),
        DataLoader(TensorDataset(x, y), whole),
        DataLoader(TensorDataset(x, y, t), whole),
        DataLoader(TensorDataset(x, y, t), whole, collate_fn=as_named),
    ]
    for loader in loaders:
        actual: Any = trainer().predict(model, loader)
        assert torch.equal(torch.cat(actual), expected)


@pytest.mark.parametrize(("hparams", "scenario"), [(EWCHParams(), "task"), (KCL, "domain")])
def test_logits_that_depend_on_the_task_need_t(hparams: AlgorithmHParams, scenario: Any) -> None:
    benchmark = own_stream(hparams, num_tasks=2, scenario=scenario)
    model = module(benchmark, hparams)
    learn(model, benchmark, 0)
    x = torch.zeros(3, 1, 3, 3)
    message = r"needs the task index of each sample here.*got t=None; call module\(x, t\)"
    with pytest.raises(ValueError, match=message):
        trainer().predict(model, DataLoader(TensorDataset(x, torch.zeros(3).long()), 3))
    with pytest.raises(ValueError, match=message):
        model.predict(x)
