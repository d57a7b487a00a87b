"""Data that are no images, user-defined losses and outputs of several arrays, in every method."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelF1Score

from sequel_benchmarks import from_arrays
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.objectives import Score
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_lightning import (
    ALGORITHMS,
    EWC,
    MLP,
    ContinualModule,
    LightningLearner,
    Naive,
    Objective,
    TaskDataModule,
    cross_entropy,
    from_outputs,
    initialise,
    make_learner,
    squared_error,
)
from sequel_lightning.algorithms.ewc import diagonal_fisher
from tests.lightning.parts import AGEM, BIC, DERPP, EVERY, ICARL, KCL, LAMAML, MCSGD, ONLINE, SI, trainer

FEATURES, OUTPUTS, TRAIN, TEST, SIZE = 5, 3, 42, 20, 4
SGD = partial(torch.optim.SGD, lr=0.02)
SILENT = FitMonitor(lambda progress: None, lambda: None)


@cache
def table(targets: str = "classes") -> Benchmark:
    """Two tasks of five features. Targets are a class, three labels, three values, one value, or tokens."""
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(FEATURES, OUTPUTS))

    def part(count: int, task: int) -> tuple[Any, Any]:
        x: Any = rng.normal(size=(count, FEATURES)).astype(np.float32)
        hidden = np.roll(x, task, 1) @ weights / 2
        y: Any = {"classes": hidden.argmax(1), "labels": hidden > 0, "value": hidden[:, 0]}.get(
            targets, hidden
        )
        if targets == "dict":
            x, y = {"table": x, "words": rng.integers(0, 6, (count, 2))}, hidden.argmax(1)
        if targets == "tokens":
            x = rng.integers(0, 6, (count, 4))
            y = np.where(np.arange(4) == 3, -100, (x + task) % 6)
        return x, y

    classes: dict[str, Any] = {"num_classes": 6} if targets == "tokens" else {}
    tasks = [(part(TRAIN, task), part(TEST, task)) for task in range(2)]
    return from_arrays(tasks, scenario="domain", **classes)


class Words(nn.Module):
    """The table and the mean of embedded words; it returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(FEATURES + 4, OUTPUTS)

    def features(self, table: Tensor, words: Tensor) -> Tensor:
        return torch.cat([table, self.embedding(words).mean(1)], 1)

    def forward(self, table: Tensor, words: Tensor) -> tuple[Tensor]:
        return (self.head(self.features(table, words)),)


class Tagger(nn.Module):
    """A class for each token; it returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)

    def features(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(x)
        return embedded

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.features(x)), "tokens": x}


def network(targets: str) -> nn.Module:
    torch.manual_seed(1)
    if targets in ("dict", "tokens"):
        return Words() if targets == "dict" else Tagger()
    outputs = 1 if targets == "value" else OUTPUTS
    return initialise(MLP((8,), outputs, image_shape=(FEATURES,)), seed=0)


def learner(
    hparams: AlgorithmHParams, targets: str, objective: Objective | None = None, **training: Any
) -> LightningLearner:
    settings = TrainingHParams(batch_size=SIZE, **training)
    options: dict[str, Any] = {"trainer": {"accelerator": "cpu"}}
    net = network(targets)
    return make_learner(hparams, net, SGD, table(targets), settings, objective=objective, **options)


def fitted(made: LightningLearner, targets: str) -> LightningLearner:
    for task in made.hparams.training_tasks(table(targets)):
        made.fit_task(task, SILENT)
    return made


def fits_without_classes(hparams: AlgorithmHParams) -> AlgorithmHParams:
    """Return the settings with a memory that needs no classes."""
    changes = {"agem": "task_quota", "derpp": "reservoir", "gdumb": "reservoir"}
    return replace(hparams, memory=changes[hparams.name]) if hparams.name in changes else hparams  # type: ignore[call-arg]


ANY = [fits_without_classes(h) for h in EVERY if h.name not in ("kcl", "icarl", "er_ace", "bic")]
any_method = pytest.mark.parametrize("hparams", ANY, ids=lambda h: f"{h.name}{getattr(h, 'lmc_policy', '')}")


@any_method
@pytest.mark.parametrize("targets", ["labels", "values", "value", "tokens", "dict"])
def test_every_method_trains_on_any_data(hparams: AlgorithmHParams, targets: str) -> None:
    if hparams == SI:
        hparams = replace(SI, si_lambda=0.1)
    made = learner(hparams, targets)
    before = made.weights() if targets not in ("dict", "tokens") else {}
    fitted(made, targets)
    assert all(np.abs(made.weights()[k] - a).max() > 1e-3 for k, a in before.items())
    results = [made.evaluate(task, "test") for task in table(targets).tasks]
    names = {"labels": "label accuracy", "tokens": "token accuracy", "dict": "accuracy"}
    assert made.score.name == names.get(targets, "squared error")
    task = table(targets).tasks[0].test.take(np.arange(TEST))
    made.module.eval()
    x = {k: torch.from_numpy(v) for k, v in task.x.items()} if targets == "dict" else torch.from_numpy(task.x)
    with torch.no_grad():
        outputs = made.module.predict(x, torch.from_numpy(task.t))
    f = {"dict": lambda: outputs[0], "tokens": lambda: outputs["logits"]}.get(targets, lambda: outputs)()
    f, y = f.double().numpy(), task.y
    if targets == "labels":
        expected = ((f > 0) == y).mean()
    elif targets == "tokens":
        expected = (f.argmax(2) == y)[y >= 0].mean()
    elif targets == "dict":
        expected = (f.argmax(1) == y).mean()
    else:
        expected = np.square(f.reshape(y.shape) - y).mean()
    assert results[0].score == pytest.approx(expected, rel=1e-5)
    assert np.isnan(results[0].masked_score) == (targets != "dict")
    assert results[0].total == TEST


@pytest.mark.parametrize("hparams", [KCL, ICARL, BIC], ids=lambda h: h.name)
@pytest.mark.parametrize("targets", ["labels", "values", "tokens"])
def test_methods_of_classes_reject_other_targets(hparams: AlgorithmHParams, targets: str) -> None:
    with pytest.raises(ValueError, match=f"^{hparams.name} needs targets that are class labels"):
        learner(hparams, targets)


@pytest.mark.parametrize("hparams", [replace(KCL, core_size=3), ICARL], ids=lambda h: h.name)
def test_methods_of_classes_train_on_tables(hparams: AlgorithmHParams) -> None:
    made = learner(hparams, "classes")
    fitted(made, "classes")
    held, pairs = made.memory_samples(), set()
    for task in table().tasks:
        train = task.train.take(np.arange(TRAIN))
        pairs |= {(x.tobytes(), int(y), task.index) for x, y in zip(train.x, train.y, strict=True)}
    kept = {(x.tobytes(), int(y), int(t)) for x, y, t in zip(*held, strict=True)}
    assert len(kept) == len(held.y) > 5
    assert kept <= pairs
    with pytest.raises(ValueError, match=f"^{hparams.name} needs an objective with classification=True"):
        learner(hparams, "classes", from_outputs(lambda f, y: F.cross_entropy(f, y, reduction="none")))
    with pytest.raises(ValueError, match=f"^{hparams.name} needs inputs that are one array"):
        learner(hparams, "dict")


@pytest.mark.parametrize("memory", ["class_balanced", "class_quota"])
def test_memories_of_classes_reject_other_targets(memory: Any) -> None:
    with pytest.raises(ValueError, match=f"^memory={memory} of er needs targets that are class labels"):
        learner(ERHParams(memory=memory), "values")


# -- one objective everywhere


def absolute(outputs: Any, y: Tensor) -> Any:
    return (outputs - y).abs().sum(1)


@any_method
def test_every_method_uses_the_users_loss(hparams: AlgorithmHParams) -> None:
    """Twice the built-in loss, with twice the weight, is the same mean; without the weight it is not."""
    if hparams == SI:
        hparams = replace(SI, si_lambda=0.1)
    builtin = squared_error()

    def doubled(model: Any, batch: Batch) -> Tensor:
        return 2 * builtin.loss(model, batch)

    same = builtin._replace(loss=doubled, weight=lambda batch: torch.full((len(batch.t),), 2.0))
    weights = [
        fitted(learner(hparams, "values", objective), "values").weights()
        for objective in (None, same, builtin._replace(loss=doubled))
    ]
    for k, a in weights[0].items():
        np.testing.assert_allclose(weights[1][k], a, rtol=1e-4, atol=1e-5)
    assert max(np.abs(weights[2][k] - a).max() for k, a in weights[0].items()) > 1e-3


def test_er_trains_as_a_loop_by_hand_with_class_weights() -> None:
    """The mean is over the class weights of batch and replay batch together."""
    w = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    made = learner(ERHParams(mem_size=12, mem_batch_size=3), "classes", cross_entropy(0.1, w.tolist()))
    net = copy.deepcopy(made.module.net)
    task = table().tasks[0]
    made.fit_task(task, SILENT)
    planner = made.module.make_planner(table().spec)
    x, y, optimizer = torch.zeros(12, FEATURES), torch.zeros(12, dtype=torch.int64), SGD(net.parameters())
    for rows in plan.epoch_batches(0, 0, 0, TRAIN, SIZE):
        samples = task.train.take(rows)
        batch = torch.from_numpy(samples.x), torch.from_numpy(samples.y)
        step = planner.next(samples.y, samples.t)
        read = torch.from_numpy(step.reads[0][step.reads[0] < 12])
        both = torch.cat([batch[0], x[read]]), torch.cat([batch[1], y[read]])
        loss = nn.CrossEntropyLoss(w.float(), label_smoothing=0.1)(net(both[0]), both[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for k, slot in enumerate(step.write):
            if slot < 12:
                x[slot], y[slot] = batch[0][k], batch[1][k]
    for actual, expected in zip(made.module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


class Trainable(nn.Module):
    """Two arrays of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(FEATURES, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"first": self.first(h), "second": self.second(h)}


def on_first(outputs: Any, y: Tensor) -> Any:
    return (outputs["first"] - y).square().sum(1)


def test_a_setting_names_the_output_that_a_method_uses() -> None:
    objective, spec = from_outputs(on_first), table("values").spec
    for hparams in (DERHParams(mem_size=8, mem_batch_size=4), MASHParams()):
        made = ALGORITHMS[hparams.name]
        with pytest.raises(
            ValueError, match=r"needs one array, or one called logits.*got dict of first \[1, 3\]"
        ):
            made(Trainable(), SGD, hparams, spec, objective=objective)
        with pytest.raises(ValueError, match="needs an array third in what the network returns"):
            made(Trainable(), SGD, replace(hparams, output="third"), spec, objective=objective)
        module: Any = made(Trainable(), SGD, replace(hparams, output="second"), spec, objective=objective)
        LightningLearner(module, TrainingHParams(batch_size=SIZE)).fit_task(table("values").tasks[0], SILENT)
        if hparams.name == "der":
            assert module.state.outputs.shape == (8, 2)
            assert float(module.state.outputs.abs().min()) > 0
        else:  # the gradient of the second output only
            importance = module.state.importance
            assert (
                float(importance["first.weight"].abs().max()) == 0 < float(importance["second.weight"].max())
            )


# -- the Fisher information


def by_hand(
    net: nn.Module, samples: Any, gradients: Callable[[Tensor, Any], list[tuple[Tensor, Any]]]
) -> Any:
    """Return the mean of sum_k w_k (d loss_k)^2 over samples; `gradients` gives the pairs (loss, w)."""
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for x, y in zip(*samples, strict=True):
        for loss, w in gradients(net(x[None]), y):
            net.zero_grad()
            loss.backward(retain_graph=True)
            for k, p in net.named_parameters():
                total[k] += w * p.grad**2  # type: ignore[operator]
    return {k: a / len(samples[0]) for k, a in total.items()}


def fisher_of(targets: str, fisher: Any, objective: Objective | None = None) -> tuple[Any, Any, Any]:
    hparams = EWCHParams(fisher=fisher, fisher_samples=None)
    net = network(targets).double()
    module = EWC(net, SGD, hparams, table(targets).spec, seed=3, objective=objective).eval()
    samples = table(targets).tasks[0].train.take(np.arange(8))
    x, y = torch.from_numpy(samples.x).double(), torch.from_numpy(samples.y)
    batches = [Batch(x[a:b], y[a:b], torch.zeros(b - a, dtype=torch.int64)) for a, b in ((0, 3), (3, 8))]
    actual = diagonal_fisher(module.frozen_params(), module, batches, hparams, 3, 1)
    return actual, net, (x, y)


def assert_equal(actual: Any, expected: Any) -> None:
    for k, a in expected.items():
        torch.testing.assert_close(actual[k], a, rtol=1e-10, atol=1e-14)


def test_the_fisher_leaves_label_smoothing_and_class_weights_out() -> None:
    objective = cross_entropy(label_smoothing=0.3, class_weights=(3.0, 0.5, 2.0))
    actual, net, samples = fisher_of("classes", "empirical", objective)
    plain, _, _ = fisher_of("classes", "empirical")
    assert all(torch.equal(actual[k], a) for k, a in plain.items())
    assert_equal(actual, by_hand(net, samples, lambda f, y: [(F.cross_entropy(f, y[None]), 1)]))


def test_the_exact_fisher_of_classes() -> None:
    actual, net, samples = fisher_of("classes", "exact")

    def every_class(f: Tensor, y: Any) -> Any:
        p = f.detach().softmax(1)[0]
        return [(F.cross_entropy(f, torch.tensor([c])), p[c]) for c in range(OUTPUTS)]

    assert_equal(actual, by_hand(net, samples, every_class))


def test_the_weighted_fisher_has_the_probability_of_the_label_as_weight() -> None:
    actual, net, samples = fisher_of("classes", "weighted")

    def weighted(f: Tensor, y: Any) -> Any:
        return [(F.cross_entropy(f, y[None]), f.detach().softmax(1)[0, y])]

    assert_equal(actual, by_hand(net, samples, weighted))


def test_the_fisher_of_the_mean_is_the_square_of_one_gradient() -> None:
    actual, net, (x, y) = fisher_of("classes", "mean")
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert_equal(actual, {k: p.grad**2 for k, p in net.named_parameters()})


def test_the_exact_fisher_of_values() -> None:
    actual, net, samples = fisher_of("values", "exact")
    assert_equal(actual, by_hand(net, samples, lambda f, y: [(f[0, d], 1) for d in range(OUTPUTS)]))


def test_the_sampled_fisher_draws_classes_with_the_numbers_of_the_plan() -> None:
    actual, net, samples = fisher_of("classes", "sampled")
    u = iter(plan.uniform(3, "fisher", 1, count=8))

    def drawn(f: Tensor, y: Any) -> Any:
        c = int((f.detach().softmax(1)[0].cumsum(0) <= next(u)).sum())
        return [(F.cross_entropy(f, torch.tensor([c])), 1)]

    assert_equal(actual, by_hand(net, samples, drawn))


def test_the_sampled_fisher_draws_one_number_for_each_value() -> None:
    actual, net, samples = fisher_of("values", "sampled")
    u = torch.from_numpy(plan.uniform(3, "fisher", 1, count=8 * OUTPUTS).reshape(8, OUTPUTS))
    noise = iter(torch.distributions.Normal(0.0, torch.tensor(1.0).double()).icdf(u))

    def drawn(f: Tensor, y: Any) -> Any:
        return [(0.5 * (f[0] - (f[0].detach() + next(noise))).square().sum(), 1)]

    for k, a in by_hand(net, samples, drawn).items():
        torch.testing.assert_close(actual[k], a, rtol=1e-8, atol=1e-12)


def test_the_fisher_of_batches_is_the_squared_gradient_of_their_means() -> None:
    actual, net, (x, y) = fisher_of("classes", "batch")
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for a, b in ((0, 3), (3, 8)):
        net.zero_grad()
        F.cross_entropy(net(x[a:b]), y[a:b]).backward()
        for k, p in net.named_parameters():
            total[k] += (b - a) * p.grad**2 / 8
    assert_equal(actual, total)


@pytest.mark.parametrize(
    ("targets", "fisher", "message"),
    [
        ("labels", "exact", "fisher=exact needs an objective with outcomes"),
        ("tokens", "exact", "fisher=exact"),
    ],
)
def test_a_fisher_that_the_objective_cannot_give_raises(targets: str, fisher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(EWCHParams(fisher=fisher), targets)


def test_a_loss_without_a_likelihood_is_rejected_by_ewc() -> None:
    with pytest.raises(ValueError, match=r"^ewc .*negative log-likelihood, got nll=None"):
        learner(EWCHParams(), "values", from_outputs(absolute))
    fitted(learner(EWCHParams(), "values", from_outputs(absolute, nll=absolute)), "values")


# -- batches that are dicts, and errors


def dict_loader(target: str, **changes: Any) -> DataLoader[Any]:
    samples = table("dict").tasks[0].train.take(np.arange(8))
    columns = {**samples.x, target: samples.y, **changes}
    return DataLoader([{k: v[n] for k, v in columns.items()} for n in range(8)], batch_size=4)  # type: ignore[arg-type]


def module_of_dicts(
    hparams: AlgorithmHParams | None = None, objective: Objective | None = None
) -> ContinualModule:
    settings = hparams or NaiveHParams()
    return ALGORITHMS[settings.name](network("dict"), SGD, settings, table("dict").spec, objective=objective)


@pytest.mark.parametrize("hparams", [NaiveHParams(), EWCHParams(), ERHParams(mem_size=8, mem_batch_size=4)])
def test_batches_of_dicts_train_as_tuples(hparams: AlgorithmHParams) -> None:
    modules = [
        module_of_dicts(hparams),
        module_of_dicts(hparams),
        module_of_dicts(hparams, cross_entropy()._replace(target="kind")),
    ]
    samples = table("dict").tasks[0].train.take(np.arange(8))
    x, y = {k: torch.from_numpy(v) for k, v in samples.x.items()}, torch.from_numpy(samples.y)
    pairs = [({k: v[n] for k, v in x.items()}, y[n]) for n in range(8)]
    loaders = [DataLoader(pairs, batch_size=4), dict_loader("labels"), dict_loader("kind")]  # type: ignore[arg-type]
    for module, loader in zip(modules, loaders, strict=True):
        trainer().fit(module, loader)
    for name, a in modules[0].state_dict().items():
        for module in modules[1:]:
            assert torch.equal(torch.as_tensor(module.state_dict()[name]), torch.as_tensor(a)), name
    predictions = trainer().predict(modules[1], loaders[1])
    assert predictions is not None
    with torch.no_grad():
        torch.testing.assert_close(predictions[0][0], modules[0](modules[0].as_batch((x, y)).x)[0][:4])


def test_task_indices_in_batches_of_dicts() -> None:
    module = module_of_dicts()
    batch = next(iter(dict_loader("labels", t=np.array([0, 1] * 4))))
    assert module.as_batch(batch).t.tolist() == [0, 1, 0, 1]
    assert sorted(module.as_batch(batch).x) == ["table", "words"]


def test_a_dict_without_the_target_raises() -> None:
    message = "must have the target 'labels' of the objective, got the keys 'table', 'words', 'kind'"
    with pytest.raises(ValueError, match=message):
        trainer().fit(module_of_dicts(), dict_loader("kind"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"words": np.zeros((8, 2), np.int32)},
            "x.words must be int64 [B, 2], as in the stream's spec, got int32 [4, 2]",
        ),
        ({"words": np.zeros((8, 2), np.float32)}, "x.words must be int64 [B, 2]"),
        ({"table": np.zeros((8, FEATURES), np.int64)}, "x.table must be float32 [B, 5]"),
        (
            {"table": np.zeros((8, 4), np.float32)},
            "x.table must be float32 [B, 5], as in the stream's spec, got float32 [4, 4]",
        ),
        ({"more": np.zeros(8)}, "x must be a dict with the keys table, words"),
    ],
    ids=["int32", "float", "int", "shape", "key"],
)
def test_an_array_that_differs_from_the_spec_raises(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer().fit(module_of_dicts(), dict_loader("labels", **changes))


def test_targets_that_differ_from_the_spec_raise() -> None:
    module = Naive(network("values"), SGD, NaiveHParams(), table("values").spec)
    x, y = torch.zeros(4, FEATURES), torch.zeros(4, OUTPUTS, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=re.escape("y must be float32 [B, 3], as in the stream's spec, got int64")
    ):
        module.as_batch((x, y))
    assert module.as_batch((x.double(), y.double())).y.dtype == torch.float64


@any_method
def test_a_loss_that_is_not_one_number_per_sample_raises(hparams: AlgorithmHParams) -> None:
    mean = from_outputs(lambda f, y: (f - y).square().mean(), nll=absolute)
    with pytest.raises(ValueError, match=re.escape("must return one number for each sample, [1], got []")):
        learner(hparams, "values", mean)
    kept = from_outputs(lambda f, y: (f - y).square().mean().reshape(1), nll=absolute)
    with pytest.raises(ValueError, match=re.escape("for each sample, [") + r"\d+\], got \[1\]"):
        fitted(learner(hparams, "values", kept), "values")


def test_outputs_that_do_not_fit_the_targets_raise() -> None:
    net = MLP((8,), 2, image_shape=(FEATURES,))
    message = "the objective must take what the network returns.*one value for each value of a target"
    with pytest.raises(ValueError, match=message):
        Naive(net, SGD, NaiveHParams(), table("values").spec)
    with pytest.raises(ValueError, match="objective must be an Objective or None, got a function"):
        Naive(network("values"), SGD, NaiveHParams(), table("values").spec, objective=absolute)  # type: ignore[arg-type]


OVERRIDDEN = [EWCHParams(), AGEM, ERHParams(), DERPP, MCSGD, ONLINE, LAMAML, ICARL, KCL]


def overriding(hparams: AlgorithmHParams) -> Any:
    base = ALGORITHMS[hparams.name]

    def loss(self: Any, outputs: Any, batch: Batch) -> Tensor:
        return 2 * base.loss(self, outputs, batch)

    return type("Own", (base,), {"loss": loss, "__module__": __name__})


@pytest.mark.parametrize("hparams", OVERRIDDEN, ids=lambda h: f"{h.name}{getattr(h, 'lmc_policy', '')}")
def test_an_override_of_the_loss_is_rejected_if_the_loss_is_used_elsewhere(hparams: AlgorithmHParams) -> None:
    with pytest.raises(ValueError, match=r"^Own must not override loss\(\), because .*; pass objective="):
        overriding(hparams)(network("classes"), SGD, hparams, table().spec)


@pytest.mark.parametrize("hparams", [NaiveHParams(), SI, MASHParams()], ids=lambda h: h.name)
def test_an_override_of_the_loss_is_used_in_the_training_step(hparams: AlgorithmHParams) -> None:
    made = [
        cls(network("classes"), SGD, hparams, table().spec)
        for cls in (ALGORITHMS[hparams.name], overriding(hparams))
    ]
    batch = made[0].as_batch((torch.ones(4, FEATURES), torch.tensor([0, 1, 2, 0])))
    plain, doubled = (module.training_loss(batch)[0] for module in made)
    assert doubled.item() == pytest.approx(2 * plain.item(), rel=1e-6)


# -- scores


def test_a_metric_with_state_is_the_score() -> None:
    """F1 over all samples is not the mean of F1 over batches."""
    f1 = partial(MultilabelF1Score, num_labels=OUTPUTS)

    def loss(outputs: Any, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, y.float(), reduction="none").sum(1)

    objective = from_outputs(loss, metric=f1, score=Score("F1"))
    made = fitted(learner(NaiveHParams(), "labels", objective, eval_batch_size=7), "labels")
    samples = table("labels").tasks[0].test.take(np.arange(TEST))
    with torch.no_grad():
        f = made.module.eval().predict(torch.from_numpy(samples.x)).numpy()
    hits, positive, true = ((f > 0) & samples.y).sum(0), (f > 0).sum(0), samples.y.sum(0)
    expected = np.mean(2 * hits / (positive + true))
    assert made.evaluate(table("labels").tasks[0], "test").score == pytest.approx(expected, rel=1e-6)
    assert made.score.name == "F1"


class Pair(nn.Module):
    """Logits and hidden units of a table, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).tanh()
        return {"hidden": hidden, "logits": self.head(hidden)}


def test_a_metric_gets_the_logits_of_several_outputs() -> None:
    accuracy = partial(MulticlassAccuracy, OUTPUTS, average="micro")
    objective = cross_entropy()._replace(values=None, metric=accuracy)
    user = MetricCollection({"micro": accuracy()})
    module = Naive(Pair(), SGD, NaiveHParams(), table().spec, objective=objective, metrics=user)
    made = LightningLearner(module, TrainingHParams(batch_size=SIZE))
    made.fit_task(table().tasks[0], SILENT)
    samples = table().tasks[0].test.take(np.arange(TEST))
    with torch.no_grad():
        logits = module.eval().predict(torch.from_numpy(samples.x))["logits"].numpy()
    expected = (logits.argmax(1) == samples.y).mean()
    assert made.evaluate(table().tasks[0], "test").score == pytest.approx(expected, rel=1e-6)
    test = trainer(1).test(module, TaskDataModule(table().tasks[0]), verbose=False)[0]
    assert test["test/micro/task_0"] == pytest.approx(expected, rel=1e-6)


def test_training_and_validation_log_the_score_by_its_name() -> None:
    objective = squared_error()
    module = Naive(network("values"), SGD, NaiveHParams(), table("values").spec, objective=objective)
    samples = table("values").tasks[0].train.take(np.arange(8))
    x, y = torch.from_numpy(samples.x), torch.from_numpy(samples.y)
    with torch.no_grad():
        before = (module(x) - y).square()
    loader: Any = DataLoader(list(zip(x, y, strict=True)), batch_size=8)  # type: ignore[arg-type]
    fit = trainer()
    fit.fit(module, loader)
    assert float(fit.callback_metrics["train/squared_error"]) == pytest.approx(float(before.mean()), rel=1e-6)
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(
        float(before.sum(1).mean()) / 2, rel=1e-6
    )
    test = trainer()
    test.test(module, loader, verbose=False)
    with torch.no_grad():
        after = (module(x) - y).square()
    assert float(test.callback_metrics["test/squared_error"]) == pytest.approx(float(after.mean()), rel=1e-5)
    assert float(test.callback_metrics["test/loss/task_0"]) == pytest.approx(
        float(after.sum(1).mean()) / 2, rel=1e-5
    )


# -- LoRA


class LoRA(nn.Module):
    """A linear layer whose weights are frozen, plus a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return result


def lora() -> nn.Module:
    return nn.Sequential(
        LoRA(nn.Linear(FEATURES, 550), 2),
        nn.ReLU(),
        LoRA(nn.Linear(550, 550), 2),
        nn.ReLU(),
        LoRA(nn.Linear(550, 3), 2),
    )


def peft_lora() -> nn.Module:
    """Return a network with adapters of the package peft."""
    peft = pytest.importorskip("peft")
    net = nn.Sequential(
        nn.Linear(FEATURES, 550), nn.ReLU(), nn.Linear(550, 550), nn.ReLU(), nn.Linear(550, 3)
    )
    adapted: nn.Module = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2", "4"]))
    return adapted


@pytest.mark.parametrize("make", [lora, peft_lora], ids=lambda make: make.__name__)
@pytest.mark.parametrize("hparams", [EWCHParams(ewc_lambda=10.0), DERPP, SI], ids=lambda h: h.name)
def test_adapters_of_a_frozen_network(hparams: AlgorithmHParams, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make()
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(p.numel() for p in net.parameters()) > 300_000 > 50 * trained > 0
    three = table().tasks * 2
    tasks = tuple(replace(task, index=i) for i, task in enumerate(three[:3]))
    stream = replace(table(), tasks=tasks)
    module: Any = ALGORITHMS[hparams.name](net, SGD, hparams, stream.spec)
    made = LightningLearner(module, TrainingHParams(batch_size=SIZE))
    for task in stream.tasks:
        made.fit_task(task, SILENT)
    assert {k for k, p in net.named_parameters() if torch.equal(p, before[k])} == frozen
    if hparams.name == "ewc":
        assert sum(a.numel() for tree in module.state for a in tree.values()) == 2 * trained
        assert made.memory_bytes() == 4 * 2 * trained
