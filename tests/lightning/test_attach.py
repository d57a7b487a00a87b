"""Callbacks of an unchanged module: against our modules and a bare Trainer, resumed, and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_lightning import AGEM, DER, ER, EWC, LFL, MAS, SI, ContinualModule, DERpp, Naive, attach
from sequel_lightning.trees import Params
from tests.lightning.user_modules import (
    CLASSES,
    SPEC,
    STEPS,
    TASKS,
    Classifier,
    adam,
    features,
    fit,
    loader,
    network,
    outputs,
    scheduled,
    trainer,
    with_loader,
)
from tests.quick import some

Pair = tuple[type[ContinualModule], Any, Callable[[], attach.Attached]]
MEMORY: dict[str, Any] = {"mem_size": 48, "mem_batch_size": 5}
PAIRS: dict[str, Pair] = {
    "ewc": (
        EWC,
        EWCHParams(ewc_lambda=30, fisher_samples=None),
        lambda: attach.EWC(30.0, samples=None),
    ),
    "online ewc": (
        EWC,
        EWCHParams(ewc_lambda=30, fisher_samples=101, accumulation="online", gamma=0.7),
        lambda: attach.EWC(30.0, accumulation="online", gamma=0.7, samples=101),
    ),
    "mas": (MAS, MASHParams(mas_lambda=0.05), lambda: attach.MAS(0.05, outputs)),
    "si": (SI, SIHParams(si_lambda=0.5, xi=0.01, clamp=True), lambda: attach.SI(0.5, 0.01, clamp=True)),
    "lfl": (
        LFL,
        LFLHParams(lfl_lambda=0.5, freeze_head=False),
        lambda: attach.LFL(0.5, features),
    ),
    "lfl with a fixed head": (LFL, LFLHParams(lfl_lambda=0.5), lambda: attach.LFL(0.5, features, "net.head")),
    "er": (ER, ERHParams(**MEMORY), lambda: attach.ER(**MEMORY)),
    "er balanced": (
        ER,
        ERHParams(memory="class_balanced", **MEMORY),
        lambda: attach.ER(memory="class_balanced", classes=CLASSES, **MEMORY),
    ),
    "der": (DER, DERHParams(alpha=0.3, **MEMORY), lambda: attach.DER(outputs, alpha=0.3, **MEMORY)),
    "derpp": (
        DERpp,
        DERppHParams(alpha=0.3, beta=0.7, distance="mean", **MEMORY),
        lambda: attach.DERpp(outputs, alpha=0.3, beta=0.7, distance="mean", **MEMORY),
    ),
    "agem": (
        AGEM,
        AGEMHParams(memory="task_quota", **MEMORY),
        lambda: attach.AGEM(memory="task_quota", num_tasks=TASKS, **MEMORY),
    ),
    "agem by class": (AGEM, AGEMHParams(**MEMORY), lambda: attach.AGEM(classes=CLASSES, **MEMORY)),
}
REPLAY = ["er", "derpp", "agem"]
ZERO: dict[str, Callable[[], attach.Attached]] = {
    "ewc": lambda: attach.EWC(0.0),
    "si": lambda: attach.SI(0.0),
    "mas": lambda: attach.MAS(0.0, outputs),
    "lfl": lambda: attach.LFL(0.0, features),
    "er": lambda: attach.ER(mem_size=0),
    "der": lambda: attach.DER(outputs, alpha=0.0),
    "derpp": lambda: attach.DERpp(outputs, alpha=0.0, beta=0.0),
    "agem": lambda: attach.AGEM(mem_size=0, num_tasks=2),
}
PLAIN: dict[str, Any] = {}
CLIPPED: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


def check_ends_like_the_module(pair: Pair, options: dict[str, Any], steps: int) -> None:
    cls, hparams, make = pair
    ours, theirs, keep = cls(network(), scheduled, hparams, SPEC), Classifier(adam), make()
    for task in range(TASKS):
        fit(ours, task, [], steps, **options)
        fit(theirs, task, [keep], steps, **options)
    for a, b in zip(theirs.net.parameters(), ours.net.parameters(), strict=True):
        assert torch.dist(a, b) < 1e-10 * b.norm()
    assert keep.tasks == TASKS


@pytest.mark.parametrize("name", PAIRS)
def test_an_attached_method_ends_like_the_module(name: str) -> None:
    check_ends_like_the_module(PAIRS[name], CLIPPED, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, CLIPPED], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_attached_method_ends_like_the_module_after_200_steps(name: str, options: dict[str, Any]) -> None:
    check_ends_like_the_module(PAIRS[name], options, 200)


@pytest.mark.parametrize("name", ["ewc", "lfl", *REPLAY])
def test_the_method_changes_the_weights(name: str) -> None:
    bare, kept, keep = Classifier(adam), Classifier(adam), PAIRS[name][2]()
    for task in range(2):
        fit(bare, task, [])
        fit(kept, task, [keep])
    assert torch.dist(bare.net.body[0].weight, kept.net.body[0].weight) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ZERO)
def test_strength_zero_is_a_bare_trainer_exactly(name: str) -> None:
    """With dropout, shuffled loaders and noise in the data: the callback draws no random numbers."""
    ends = []
    callbacks: list[list[Callback]] = [[], [ZERO[name]()]]
    for keep in callbacks:
        module = Classifier(adam, dropout=0.3)
        torch.manual_seed(1)
        for task in range(2):
            data = loader(task, shuffle=True, steps=10, noise=0.1)
            trainer(keep, max_epochs=2).fit(module, with_loader(data, keep, bare=True))
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


@pytest.mark.parametrize("name", some(["ewc", "si", "lfl", "derpp", "agem"], ["si", "agem"]))
def test_gradient_scaling_changes_nothing(name: str) -> None:
    """Nor does autocast in float64. Penalties and draws are scaled as the loss is, and unscaled."""
    ends = []
    for scaled in (False, True):
        module, keep = Classifier(adam), PAIRS[name][2]()
        for task in range(2):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else None
            fit(module, task, [keep], plugins=plugins, **CLIPPED)
        ends.append(module.state_dict())
    for key, value in ends[0].items():
        assert torch.dist(value.double(), ends[1][key].double()) <= 1e-12 * value.double().norm(), key


class SinglePrecision(Classifier):
    """A user's module in float32."""

    def __init__(self) -> None:
        super().__init__(adam)
        self.float()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return super().training_step({**batch, "x": batch["x"].float()}, index)


class Observer(Callback):
    """Keeps the weights and the gradients before each optimizer step, and the weights after it."""

    def __init__(self) -> None:
        self.before: list[Params] = []
        self.gradients: list[Params] = []
        self.after: list[Params] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        params = dict(pl_module.named_parameters())
        self.before.append({name: p.detach().clone() for name, p in params.items()})
        self.gradients.append({name: p.grad.clone() for name, p in params.items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


class LastPath(Callback):
    """Keeps the path integral of a callback before the task is consolidated."""

    def __init__(self, keep: attach.SI) -> None:
        self.keep = keep
        self.path: Params = {}

    def on_train_batch_end(self, *args: Any) -> None:
        self.path = {name: value.clone() for name, value in self.keep.path.items()}


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "float32": dict,
    "autocast": lambda: {"precision": "bf16-mixed"},
    "scaled": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_si_sees_the_gradient_without_its_penalty_and_adds_it_once_per_step(precision: str) -> None:
    """After accumulation and unscaling, before clipping; the callbacks run in the order of the list."""
    module, keep = SinglePrecision(), attach.SI(5.0, 0.01)
    fit(module, 0, [keep], steps=6)
    before, after, last = Observer(), Observer(), LastPath(keep)
    importance, anchor = dict(keep.importance), dict(keep.anchor)
    fit(module, 1, [before, keep, after, last], steps=6, **CLIPPED, **PRECISIONS[precision]())
    assert len(before.gradients) == 3
    for name, path in last.path.items():
        expected = torch.zeros_like(path)
        for k in range(3):
            weights, gradient = before.before[k][name], before.gradients[k][name]
            penalty = 10 * importance[name] * (weights - anchor[name])
            torch.testing.assert_close(after.gradients[k][name], gradient + penalty)
            expected -= gradient * (before.after[k][name] - weights)
        torch.testing.assert_close(path, expected)
    norms = [torch.stack([g.norm() for g in step.values()]).norm() for step in before.gradients]
    assert min(map(float, norms)) > CLIPPED["gradient_clip_val"]  # clipping would have changed them


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", [13, 20, 27], ids=["middle", "end of an epoch", "second epoch"])
@pytest.mark.parametrize("name", some(["si", "er", "lfl", "derpp", "agem by class"], ["er"]))
def test_a_fit_resumes_within_a_task(name: str, step: int, tmp_path: Path) -> None:
    """With dropout; replay also with a shuffled loader and noise in the data, in a new process's callback."""
    replay = name in ("er", "derpp", "agem by class")

    def data(task: int, keep: Any, past: Any = ()) -> Any:
        batches = loader(task, steps=20, shuffle=replay, noise=0.1 * replay)
        return with_loader(batches, [keep], **({"past": past} if past else {}))

    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}

    def run(path: Path | None) -> dict[str, Any]:
        torch.manual_seed(3)
        module, keep = Classifier(adam, dropout=0.2), PAIRS[name][2]()
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
        if path is None:
            trainer([keep]).fit(module, data(0, keep))
            trainer([keep, saver], **options).fit(module, data(1, keep))
        else:
            past = [loader(0, steps=20, noise=0.1)] if replay else ()
            fresh = data(1, keep, past)
            trainer([keep, saver], **options).fit(module, fresh, ckpt_path=str(path), weights_only=True)
        trainer([keep]).fit(module, data(2, keep))
        state = keep.state_dict()
        return {**module.state_dict(), "rows": state.get("rows"), "importance": state.get("importance", {})}

    straight, resumed = run(None), run(tmp_path / f"step={step}.ckpt")
    assert straight.pop("rows") == resumed.pop("rows")
    before, after = straight.pop("importance"), resumed.pop("importance")
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert all(torch.equal(straight[key], value) for key, value in resumed.items())


def test_the_loss_of_the_training_step_is_the_likelihood() -> None:
    ends = []
    for nll in (
        None,
        lambda module, batch: F.cross_entropy(outputs(module, batch), batch["y"], reduction="none"),
    ):
        module, keep = Classifier(adam), attach.EWC(1.0, nll=nll, samples=20)
        fit(module, 0, [keep])
        ends.append(keep.importance)
        assert not module.accuracy.update_called  # since the end of the epoch reset it
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__(adam)
        self.automatic_optimization = False


class Failing(Callback):
    """Ends a fit with an error."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("stop")


def test_errors_before_training() -> None:
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(Manual(), 0, [attach.EWC(1.0)])
    with pytest.raises(ValueError, match="needs a module of your own, got a Naive"):
        fit(Naive(network(), adam), 0, [attach.EWC(1.0)])
    with pytest.raises(ValueError, match=r"head must be the name of a submodule of Classifier, got 'top'"):
        fit(Classifier(adam), 0, [attach.LFL(1.0, features, head="top")])
    for call, message in (
        (lambda: attach.EWC(-1.0), "strength must be >= 0"),
        (lambda: attach.LFL(-1.0, features), "strength must be >= 0"),
        (lambda: attach.EWC(1.0, gamma=0.5), "gamma is only used with accumulation='online'"),
        (lambda: attach.EWC(1.0, samples=0), "samples must be >= 1 or None"),
        (lambda: attach.SI(1.0, xi=0.0), "xi must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


NO_CALLBACKS = ["ICaRL", "KCL", "LaMAML", "MCSGD", "Joint", "StableSGD", "Naive"]


@pytest.mark.parametrize("name", [*NO_CALLBACKS, "ERACE", "GEM", "LwF", "MIR"])
def test_a_method_that_cannot_be_attached_says_why(name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name} cannot be attached to your own module: it .*"):
        getattr(attach, name)
    with pytest.raises(AttributeError, match="has no attribute 'EWCC'"):
        attach.EWCC  # noqa: B018


def test_an_unfinished_task_has_to_be_consolidated() -> None:
    module, keep = Classifier(adam), attach.EWC(1.0)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, 0, [keep, Failing()])
    with pytest.raises(ValueError, match="task 0 was never consolidated"):
        fit(module, 1, [keep])
    keep.consolidate(module, loader(0))
    with pytest.raises(ValueError, match="no task has begun"):
        keep.consolidate(module, loader(0))
    fit(module, 1, [keep])
    assert keep.tasks == 2


def test_a_checkpoint_of_a_finished_task_begins_the_next_one_by_hand(tmp_path: Path) -> None:
    """As in the process that wrote it; `ckpt_path` would train nothing."""
    torch.manual_seed(3)
    module, keep, path = (
        Classifier(adam, dropout=0.2),
        attach.ER(mem_size=20, mem_batch_size=5),
        tmp_path / "end",
    )
    first = fit(module, 0, [keep], steps=3)
    first.save_checkpoint(path)
    with pytest.raises(ValueError, match="this Trainer is spent: max_epochs=1"):
        first.fit(module, with_loader(loader(1, steps=3), [keep]))
    fit(module, 1, [keep], steps=3)

    torch.manual_seed(4)
    resumed, kept = Classifier(adam, dropout=0.2), attach.ER(mem_size=20, mem_batch_size=5)
    data = with_loader(loader(1, steps=3), [kept], past=[loader(0, steps=3)])
    with pytest.raises(
        ValueError, match="from after the end of task 0, so nothing is left to resume; to begin"
    ):
        trainer([kept]).fit(resumed, data, ckpt_path=str(path), weights_only=True)
    checkpoint = torch.load(path, weights_only=True)
    resumed.load_state_dict(checkpoint["state_dict"])
    kept.load_state_dict(checkpoint["callbacks"][kept.state_key])
    trainer([kept]).fit(resumed, data)
    assert kept.rows == keep.rows
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())


class Bags(pl.LightningModule):
    """Texts as flat indices with offsets, or as padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = torch.nn.EmbeddingBag(9, 4, padding_idx=0), torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, index: int) -> Any:
        *texts, labels = batch
        return F.cross_entropy(self.head(self.bag(*texts)), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def test_the_samples_of_a_batch_are_its_rows() -> None:
    offsets: Any = [(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2]), torch.tensor([0, 1]))]
    with pytest.raises(
        ValueError, match=r"each of them needs one row per sample: pad sequences in collate_fn"
    ):
        trainer([attach.EWC(1.0)]).fit(Bags(), DataLoader(offsets, batch_size=None))
    padded: Any = [(torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([0, 1]))]
    module, keep = Bags(), attach.EWC(1.0)
    trainer([keep]).fit(module, DataLoader(padded, batch_size=None))
    expected = torch.zeros(2)
    for ids, label in ([1, 2], 0), ([3, 4, 5], 1):
        logits = module.head(module.bag.weight[ids].mean(0))
        expected += (logits.softmax(0) - torch.eye(2)[label]).detach().square() / 2
    torch.testing.assert_close(keep.importance["head.bias"], expected)
