"""LightningCLI builds every algorithm from the command line or a YAML file."""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import ALGORITHMS, EWC, ContinualModule
from sequel_lightning.settings import plain_hparams, plain_spec
from tests.lightning.parts import (
    ER,
    KCL,
    assert_same,
    data,
    every_algorithm,
    everything,
    network,
    own_stream,
    trainer,
)

# Lightning 2.6 uses older names of jsonargparse 4.53.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:[\s\S]*(JsonargparseDeprecationWarning|was deprecated in v4)"
)

NETWORK = {
    "class_path": "sequel_lightning.MLP",
    "init_args": {"widths": [8], "num_classes": 4, "image_shape": [3, 3, 1]},
}
OPTIONS: dict[str, Any] = {"run": False, "save_config_callback": None, "seed_everything_default": False}
OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}


@pytest.fixture(autouse=True)
def _no_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])


class TaskOfStream(pl.LightningDataModule):
    """A user's data module, which knows its stream.

    Args:
        task: index of the task.
        coresets: whether samples are set aside, as KCL needs them.
    """

    def __init__(self, task: int = 0, coresets: bool = False) -> None:
        super().__init__()
        self.benchmark: Benchmark = own_stream(KCL if coresets else EWCHParams())
        self.spec = self.benchmark.spec
        self.data = data(self.benchmark, task)
        self.task = self.data.task

    def train_dataloader(self) -> Any:
        self.data.trainer = self.trainer
        return self.data.train_dataloader()


class LinkedCLI(LightningCLI):
    """Takes the spec from the data module."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")


def built(
    cls: type[ContinualModule], config: dict[str, Any], path: Path, linked: bool = True
) -> LightningCLI:
    """Return the CLI that has read a YAML file and built everything."""
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = LinkedCLI if linked else LightningCLI
    return cli(cls, TaskOfStream, args=[f"--config={file}"], **OPTIONS)


@every_algorithm
def test_every_algorithm_is_built_from_a_yaml_file(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    settings = {k: v for k, v in plain_hparams(hparams).items() if k != "name"}
    model = {"net": NETWORK, "optimizer": OPTIMIZER, "hparams": settings, "seed": 3}
    config = {"model": model, "data": {"coresets": hparams.name == "kcl"}}
    cli = built(ALGORITHMS[hparams.name], config, tmp_path)
    assert type(cli.model) is ALGORITHMS[hparams.name]
    assert cli.model.algorithm_hparams == hparams
    assert (cli.model.seed, cli.model.spec) == (3, cli.datamodule.spec)
    made = cli.model.optimizer_factory(cli.model.net.parameters())
    assert type(made) is torch.optim.SGD
    assert made.defaults["momentum"] == 0.9


def test_two_tasks_of_a_command_line_end_as_in_python(tmp_path: Path) -> None:
    arguments = [
        "--model.net=sequel_lightning.MLP",
        "--model.net.widths=[8]",
        "--model.net.num_classes=4",
        "--model.net.image_shape=[3,3,1]",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.1",
        "--model.hparams.ewc_lambda=10",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=2",
    ]
    benchmark, path = own_stream(EWCHParams()), tmp_path / "task_0.ckpt"
    expected = EWC(
        network(benchmark), lambda p: torch.optim.SGD(p, lr=0.1), EWCHParams(ewc_lambda=10.0), benchmark.spec
    )
    resumed: Any = None
    for task in range(2):
        cli = LinkedCLI(EWC, TaskOfStream, args=[*arguments, f"--data.task={task}"], **OPTIONS)
        model = cli.model
        if resumed is None:
            model.net.load_state_dict(expected.net.state_dict())
        else:
            model = EWC.load_from_checkpoint(path, net=cli.model.net, optimizer=cli.model.optimizer_factory)
        cli.trainer.fit(model, cli.datamodule)
        cli.trainer.save_checkpoint(path)
        trainer().fit(expected, datamodule=data(benchmark, task))
        assert_same(everything(model), everything(expected))
        resumed = model


def test_a_spec_is_read_from_the_file_without_a_link(tmp_path: Path) -> None:
    spec = own_stream(ER).spec
    model = {"net": NETWORK, "optimizer": OPTIMIZER, "hparams": {"mem_size": 20}, "spec": plain_spec(spec)}
    cli = built(ALGORITHMS["er"], {"model": model}, tmp_path, linked=False)
    assert plain_spec(cli.model.spec) == plain_spec(spec)


def test_a_setting_out_of_its_range_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"net": NETWORK, "optimizer": OPTIMIZER, "hparams": {"ewc_lambda": -1.0}}
    with pytest.raises(ValueError, match="ewc_lambda must be >= 0"):
        built(EWC, {"model": model}, tmp_path)
    model["hparams"] = {"lamda": 1.0}
    with pytest.raises(SystemExit):
        built(EWC, {"model": model}, tmp_path)
    assert "lamda" in capsys.readouterr().err
