"""Settings and specs as plain values: in checkpoints, in hparams.yaml, and back in a module."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_lightning import ALGORITHMS, ER, EWC, ContinualModule, LightningLearner
from sequel_lightning.settings import hparams_from, plain_hparams, plain_spec, spec_from
from tests.lightning.parts import (
    BATCH,
    MOMENTUM,
    assert_same,
    every_algorithm,
    everything,
    learn,
    module,
    network,
    own_loader,
    own_stream,
    stream,
    trainer,
)

SPEC = stream(3, "task").spec._replace(
    normalisation=Normalisation((0.1, 0.2), (0.5, 0.25)), augmentation=Augmentation(2, True)
)
PLAIN = {
    "x": {"shape": [3, 3, 1], "dtype": "uint8"},
    "y": {"shape": [], "dtype": "int64"},
    "num_classes": 6,
    "num_tasks": 3,
    "scenario": "task",
    "classes": [[0, 1], [2, 3], [4, 5]],
    "normalisation": {"mean": [0.1, 0.2], "std": [0.5, 0.25]},
    "augmentation": {"padding": 2, "flip": True},
}


def test_a_spec_as_plain_values_and_back() -> None:
    assert plain_spec(SPEC) == PLAIN
    back = spec_from(yaml.safe_load(yaml.safe_dump(PLAIN)))
    assert back._replace(mask=SPEC.mask, max_evaluated=SPEC.max_evaluated) == SPEC
    assert back.mask.dtype == np.bool_
    np.testing.assert_array_equal(back.mask, SPEC.mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": [[0, 1]]}, "spec.classes must list, for each of the 3 tasks"),
        ({"classes": [[0], [1], [6]]}, "classes from 0 to 5, got"),
        ({"colour": 1}, "missing or unknown: colour"),
    ],
)
def test_a_wrong_spec_raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from({**PLAIN, **change})
    with pytest.raises(ValueError, match="missing or unknown: scenario"):
        spec_from({k: v for k, v in PLAIN.items() if k != "scenario"})


@every_algorithm
def test_a_checkpoint_needs_the_network_and_the_optimizer_only(
    hparams: AlgorithmHParams, tmp_path: Path
) -> None:
    """With `weights_only=True`, which reads plain values alone."""
    benchmark, path = own_stream(hparams), tmp_path / "after.ckpt"
    model = module(benchmark, hparams, seed=3)
    learn(model, benchmark, 0).save_checkpoint(path)
    again = ALGORITHMS[hparams.name].load_from_checkpoint(
        path, net=network(benchmark), optimizer=MOMENTUM, weights_only=True
    )
    assert again.algorithm_hparams == hparams
    assert again.seed == 3
    assert again.spec is not None
    assert plain_spec(again.spec) == plain_spec(benchmark.spec)
    for one in (model, again):
        learn(one, benchmark, 1)
    assert_same(everything(again), everything(model))


def test_what_is_given_wins_over_the_file(tmp_path: Path) -> None:
    benchmark, path = stream(), tmp_path / "after.ckpt"
    learn(module(benchmark, EWCHParams(ewc_lambda=10.0)), benchmark, 0).save_checkpoint(path)
    parts: dict[str, Any] = {"net": network(benchmark), "optimizer": MOMENTUM}
    again = EWC.load_from_checkpoint(path, **parts, hparams=EWCHParams(ewc_lambda=2.0))
    assert (again.strength, again.hparams["hparams"]["ewc_lambda"]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="settings of ewc, and er is what they are given to"):
        ER.load_from_checkpoint(path, **parts)


@pytest.mark.parametrize("spec", [True, False])
@pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])
def test_loggers_write_hparams_yaml(logger_class: Any, spec: bool, tmp_path: Path) -> None:
    benchmark = stream(2, "class")
    hparams = MASHParams(mas_lambda=0.5, mas_samples=None)
    model = module(benchmark, hparams, seed=7, spec=benchmark.spec if spec else None)
    logger = logger_class(tmp_path, "log")
    trainer(logger=logger).fit(model, own_loader(benchmark, 0, with_task=False))
    written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert written["seed"] == 7
    assert written["hparams"]["name"] == "mas"
    assert written["hparams"]["mas_lambda"] == 0.5
    assert hparams_from(written["hparams"], MASHParams) == hparams
    assert written["spec"] == (plain_spec(benchmark.spec) if spec else None)
    if spec:
        assert written["spec"]["classes"] == [[0, 1], [2, 3]]


def test_a_run_logs_its_own_configuration_instead(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "log")
    learner = LightningLearner(module(stream()), TrainingHParams(batch_size=BATCH), loggers=[logger])
    assert not learner.module._log_hyperparams
    assert learner.module.hparams["hparams"]["name"] == "ewc"


@every_algorithm
def test_a_constructor_takes_plain_values(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams)
    plain = {"hparams": plain_hparams(hparams), "spec": plain_spec(benchmark.spec)}
    text = yaml.safe_load(yaml.safe_dump(plain))
    model = ALGORITHMS[hparams.name](network(benchmark), MOMENTUM, **text)
    assert model.algorithm_hparams == hparams
    assert model.spec is not None
    np.testing.assert_array_equal(model.spec.mask, benchmark.spec.mask)


def test_wrong_settings_raise() -> None:
    net = network(stream())
    with pytest.raises(ValueError, match=r"ewc has no setting lamda; its settings are .*ewc_lambda"):
        EWC(net, MOMENTUM, {"lamda": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ewc_lambda must be .*>= 0"):
        EWC(net, MOMENTUM, {"ewc_lambda": -1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="EWC needs EWCHParams, got MASHParams"):
        EWC(net, MOMENTUM, MASHParams())


@every_algorithm
def test_the_signature_has_the_settings_and_their_defaults(hparams: AlgorithmHParams) -> None:
    """`help()` and LightningCLI read it; no constructor is written out again in a method's file."""
    cls = ALGORITHMS[hparams.name]
    assert inspect.get_annotations(cls.__init__)["hparams"] is type(hparams)
    parameter = inspect.signature(cls).parameters["hparams"]
    assert parameter.annotation is type(hparams)
    assert parameter.default == type(hparams)()


def test_settings_left_out_have_their_defaults() -> None:
    assert EWC(network(stream()), MOMENTUM).algorithm_hparams == EWCHParams()


def test_an_own_method_takes_plain_values_too(tmp_path: Path) -> None:
    class Doubled(EWC):
        """With one more setting than EWC, and another constructor."""

        def __init__(self, *args: Any, factor: float = 2.0, **options: Any) -> None:
            super().__init__(*args, **options)
            self.factor = factor

    benchmark, path = stream(), tmp_path / "after.ckpt"
    model = Doubled(network(benchmark), MOMENTUM, EWCHParams(), benchmark.spec, factor=3.0)
    learn(model, benchmark, 0).save_checkpoint(path)
    again = Doubled.load_from_checkpoint(path, net=network(benchmark), optimizer=MOMENTUM)
    assert isinstance(again, ContinualModule)
    assert again.algorithm_hparams == EWCHParams()
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
