"""The private names that `sequel_lightning._compat` uses still exist and do what is needed."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn

from sequel_core.algorithms.naive import NaiveHParams
from sequel_lightning import _compat
from tests.events import scalars
from tests.lightning.parts import BATCH, STEPS, At, data, module, own_loader, stream, trainer


def test_the_trainer_of_a_module() -> None:
    benchmark = stream()
    model, new = module(benchmark, NaiveHParams()), trainer()
    assert _compat.attached_trainer(model) is None
    new.fit(model, datamodule=data(benchmark, 0))
    assert _compat.attached_trainer(model) is new


def test_the_step_of_loggers(tmp_path: Path) -> None:
    class Logs(pl.LightningModule):
        """Logs its batch's index through Lightning."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("index", float(batch_idx))
            return self.layer(torch.ones(1)).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self) -> None:
            _compat.set_logging_step(self.trainer, 100)

    logger = CSVLogger(tmp_path, "", "")
    new = pl.Trainer(
        max_steps=3, logger=logger, log_every_n_steps=1, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    new.fit(Logs(), own_loader(stream(), 0, with_task=False))
    assert _compat.logging_step(new) == 103
    steps = [row.split(",")[-1] for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["100", "101", "102"]


def test_the_hook_before_a_transfer_is_the_data_modules_or_the_modules() -> None:
    calls: list[str] = []

    class Hooked(pl.LightningDataModule):
        """Has a batch hook."""

        def train_dataloader(self) -> Any:
            return own_loader(stream(), 0, with_task=True)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("data module")
            return batch

    model = module(stream(), NaiveHParams())
    note = At(lambda t, _: _compat.before_batch_transfer(model, 0), "on_train_start")
    trainer(callbacks=[note], max_steps=1).fit(model, datamodule=Hooked())
    assert calls[0] == "data module"


def test_the_batches_below_a_fetcher_and_their_number() -> None:
    seen: list[Any] = []
    benchmark = stream()

    def read(new: pl.Trainer, _: str) -> None:
        loop: Any = new.fit_loop
        fetcher = loop._data_fetcher
        before = fetcher.fetched
        seen.append([len(batch[2]) for batch in _compat.loaders_batches(fetcher)])
        seen.append(fetcher.fetched - before)

    note = At(read, "on_train_batch_start", step=0)
    trainer(callbacks=[note], max_steps=1).fit(
        module(benchmark, NaiveHParams()), train_dataloaders=data(benchmark, 0).train_dataloader()
    )
    assert seen == [[BATCH] * (STEPS - 1), STEPS - 1]


def test_signal_handlers_are_kept() -> None:
    handlers: list[Any] = []
    note = At(lambda t, _: handlers.append(signal.getsignal(signal.SIGTERM)), "on_train_start")
    benchmark, new = stream(), trainer(callbacks=[note])
    _compat.keep_signal_handlers(new)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        expected = signal.getsignal(signal.SIGTERM)
        new.fit(module(benchmark, NaiveHParams()), datamodule=data(benchmark, 0))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == [expected]


def test_the_directory_of_checkpoints(tmp_path: Path) -> None:
    new = trainer(default_root_dir=tmp_path)
    assert Path(_compat.checkpoint_directory(ModelCheckpoint(), new)) == tmp_path / "checkpoints"
    assert Path(_compat.checkpoint_directory(ModelCheckpoint(tmp_path / "own"), new)) == tmp_path / "own"


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_whether_a_logger_has_started(tmp_path: Path) -> None:
    csv = CSVLogger(tmp_path, "", "")
    assert not _compat.has_experiment(csv)
    csv.log_metrics({"a": 1.0}, 0)
    assert _compat.has_experiment(csv)
    other = CSVLogger(tmp_path, "", "")
    _compat.set_experiment(other, csv.experiment)
    assert other.experiment is csv.experiment


def test_tensorboard_purges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda **given: arguments.update(given))
    logger = TensorBoardLogger(tmp_path, "", "")
    _compat.purge_after(logger, 1)
    assert logger.experiment is None
    assert arguments["purge_step"] == 2


def test_tensorboard_takes_summaries(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    _compat.add_summary(logger, Summary(value=[Summary.Value(tag="raw", simple_value=3.0)]))
    logger.finalize("success")
    assert [value for _, value in scalars(tmp_path)["raw"]] == [3.0]


def test_wandb_gets_no_anonymous(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert "anonymous" in logger._wandb_init
    assert "anonymous" not in _compat.without_anonymous(logger)._wandb_init


def test_operators_on_lists_of_tensors() -> None:
    def lists() -> tuple[list[Tensor], list[Tensor]]:
        return [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(6.0)]

    def values(tensors: list[Tensor]) -> list[Any]:
        return [tensor.tolist() for tensor in tensors]

    a, b = lists()
    assert values(_compat.foreach_sub(a, b)) == [[-3.0, -3.0], -3.0]
    assert values(_compat.foreach_mul(a, b)) == [[4.0, 10.0], 18.0]
    assert values(_compat.foreach_mul(a, torch.tensor(2.0))) == [[2.0, 4.0], 6.0]
    _compat.foreach_mul_(a, b)
    assert values(a) == [[4.0, 10.0], 18.0]
    _compat.foreach_add_(a, b, alpha=2)
    assert values(a) == [[12.0, 20.0], 30.0]
    _compat.foreach_copy_(a, b)
    assert values(a) == values(b)


def test_an_optimizer_without_records_takes_the_same_steps() -> None:
    values = []
    for context in (nullcontext, _compat.without_records):
        layer = nn.Linear(3, 2)
        nn.init.constant_(layer.weight, 0.5)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        with context(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                layer(torch.arange(3.0)).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
        assert not vars(optimizer).keys() & {"step", "zero_grad"}
        assert all(p.grad is None for p in layer.parameters())
        values.append(layer.weight.detach())
    assert torch.equal(*values)


def test_an_optimizer_with_hooks_or_a_profiler_keeps_its_records() -> None:
    layer, calls = nn.Linear(3, 2), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.profiler.profile() as profile, _compat.without_records(optimizer):
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}
    hook = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with _compat.without_records(optimizer):
        optimizer.step()
    assert calls == [1]
    hook.remove()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # counts the calls of `step`
    step = optimizer.step
    with _compat.without_records(optimizer):
        assert optimizer.step is step
    assert scheduler.get_last_lr() == [0.1]


def test_the_version_of_a_tensor_changes_when_it_is_written_to() -> None:
    tensor = torch.zeros(2)
    before = _compat.tensor_version(tensor)
    assert before == _compat.tensor_version(tensor)
    tensor.add_(1)
    assert _compat.tensor_version(tensor) != before
    with torch.inference_mode():
        assert _compat.tensor_version(torch.zeros(2)) is None


def test_buffers_of_a_module_can_be_replaced() -> None:
    net, new = nn.BatchNorm1d(2), torch.ones(2)
    assert list(_compat.buffers_of(net)) == ["running_mean", "running_var", "num_batches_tracked"]
    _compat.buffers_of(net)["running_mean"] = new
    assert net.running_mean is new


def test_a_trainer_without_a_launcher_starts_no_processes() -> None:
    scripts = trainer(devices=2, strategy="ddp")
    assert scripts.strategy.launcher is not None
    _compat.without_launcher(scripts)
    assert scripts.strategy.launcher is None


def test_the_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    benchmark = stream()
    model, new = module(benchmark, NaiveHParams()), trainer()
    new.fit(model, datamodule=data(benchmark, 0))
    new.save_checkpoint(tmp_path / "saved.ckpt")
    expected = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    actual = _compat.dump_checkpoint(new)
    assert actual.keys() == expected.keys()
    assert actual["global_step"] == expected["global_step"] == STEPS
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], tensor)


class Hooked(_compat.ConvertHook, _compat.LoadHook):
    """Notes the calls of its hooks; its buffer stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.register_buffer("total", torch.zeros(2))

    def before_load(self, state_dict: Any, prefix: str) -> None:
        self.calls.append(f"load {prefix}")

    def converted(self, tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        new = convert(tensor)
        return new if new.dtype == torch.float32 else tensor

    def after_convert(self) -> None:
        self.calls.append("converted")


def test_hooks_of_modules() -> None:
    outer = nn.Sequential(Hooked())
    inner: Any = outer[0]
    outer.load_state_dict({"0.total": torch.ones(2)})
    outer.half()
    assert inner.calls == ["load 0.", "converted"]
    assert inner.total.dtype == torch.float32
    assert inner.total.tolist() == [1.0, 1.0]
