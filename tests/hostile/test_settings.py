"""Every setting checks its values, and errors name settings that cannot be combined."""

import math
import typing
from collections.abc import Iterator
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from sequel_benchmarks import PermutedSettings, RotatedSettings, SplitSettings
from sequel_core.algorithms import ALGORITHMS
from sequel_core.backbones import BACKBONES
from sequel_core.experiment.aliases import SECTIONS, canonical
from sequel_core.experiment.build import build, build_benchmark
from sequel_core.experiment.compose import compose, merge
from sequel_core.experiment.schema import ExperimentConfig, choices, settings
from sequel_core.hparams import (
    CheckpointHParams,
    JaxHParams,
    OptimizerHParams,
    TrainerHParams,
    TrainingHParams,
)
from sequel_core.settings import Settings, allowed
from tests.hostile.fuzzing import Sandbox

STREAMS = {"splitdigits": SplitSettings, "permuteddigits": PermutedSettings, "rotateddigits": RotatedSettings}
CLASSES: dict[str, tuple[str, type[Settings]]] = {
    **{f"algo={name}": ("algo", cls) for name, cls in ALGORITHMS.items()},
    **{f"backbone={name}": ("backbone", cls) for name, cls in BACKBONES.items()},
    **{f"benchmark={name}": ("benchmark", cls) for name, cls in STREAMS.items()},
    "optimizer=sgd": ("optimizer", OptimizerHParams),
    "optimizer=adam": ("optimizer", OptimizerHParams),
    "training": ("training", TrainingHParams),
    "checkpoint": ("checkpoint", CheckpointHParams),
    "trainer": ("trainer", TrainerHParams),
    "jax": ("jax", JaxHParams),
}
DEFAULTS = {
    "algo.name": "naive",
    "benchmark.name": "rotateddigits",
    "backbone.type": "mlp",
    "optimizer.type": "sgd",
}
UNCHECKED = {  # any text; torchvision, Lightning and the network's outputs decide which is valid
    "backbone.model", "backbone.weights", "trainer.accelerator", "trainer.strategy", "trainer.precision",
    "algo.layer",
    "algo.output",
}  # fmt: skip


def fields_of(cls: type[Settings]) -> Iterator[tuple[Field[Any], set[Any]]]:
    """Yield each field with its types; for lists also the types of the items."""
    hints = get_type_hints(cls)
    for spec in fields(cls):
        yield spec, set(types_of(hints[spec.name]))


def types_of(hint: Any) -> Iterator[Any]:
    origin = get_origin(hint)
    if origin in (typing.Union, UnionType):
        for option in get_args(hint):
            yield from types_of(option)
    elif origin is tuple:
        yield tuple
        yield from types_of(get_args(hint)[0])
    else:
        yield Literal if origin is Literal else hint


def invalid_values(spec: Field[Any], types: set[Any]) -> list[Any]:
    """Return values that a field must reject, among them the nearest ones outside its bounds."""
    wrong: list[Any] = ["no such value", {"a": 1}, object()]
    wrong += [] if type(None) in types else [None]
    if bool in types:
        return [*wrong, 0, 1, "true", [], math.nan]
    if {int, float} & types:
        wrong += [True, math.nan, math.inf, -math.inf, 10**400, -(10**400), "1", 1j, [["1"]]]
        whole, bounds = int in types, spec.metadata
        for key, step in (("ge", -1), ("le", 1)):
            if key in bounds:
                wrong.append(bounds[key] + step if whole else math.nextafter(bounds[key], step * math.inf))
        wrong += [bounds[key] for key in ("gt", "lt") if key in bounds]
        wrong += [2**63, -(2**63), 1.5] if whole else []
    else:
        wrong += [True, 0, 1.5, math.nan, []]
    return [value for value in wrong if not (str in types and isinstance(value, str))]


@pytest.mark.parametrize("name", CLASSES)
def test_a_setting_rejects_invalid_values(name: str) -> None:
    section, cls = CLASSES[name]
    for spec, types in fields_of(cls):
        if f"{section}.{spec.name}" not in UNCHECKED:
            assert allowed(spec) or types & {bool, Literal}, f"{spec.name} has no range"
        values = invalid_values(spec, types)
        values += [[value] for value in values] if tuple in types else []
        for value in values:
            with pytest.raises(ValueError) as error:  # noqa: PT011
                cls(**{spec.name: value})
            message = str(error.value)
            assert message.startswith(f"{spec.name} must be "), (value, message)
            digits = repr(value)[1:-1][:20]
            assert digits in message or "0000" in digits, (value, message)  # huge numbers are shown as inf


def built(line: list[str]) -> ExperimentConfig:
    """Build overrides like `compose`, but without Hydra, which takes half a second."""
    return build(merge(DEFAULTS, canonical({key: yaml.safe_load(value) for key, value in map(split, line)})))


def split(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


@pytest.mark.parametrize("name", CLASSES)
def test_a_configuration_names_the_section_and_the_setting(name: str) -> None:
    section, cls = CLASSES[name]
    known = {spec.key for spec in settings(section, name.partition("=")[2])}
    for spec, types in fields_of(cls):
        if spec.name not in known or f"{section}.{spec.name}" in UNCHECKED:
            continue
        for text in (".nan", ".inf", "-.inf", "no such value"):
            value = f"[{text}]" if tuple in types else text
            with pytest.raises(ValueError, match=rf"^{section}\.{spec.name} must be "):
                build_benchmark(built([*([name] if "=" in name else []), f"{section}.{spec.name}={value}"]))


def misspelled() -> Iterator[tuple[list[str], str]]:
    """Yield command lines in which one key lacks a letter, and the correct key, for every key."""
    for section in (*SECTIONS, "training", "checkpoint", "trainer", "jax", "logger"):
        for name in choices(section) if section in SECTIONS or section == "logger" else [""]:
            prefix = f"logger.{name}" if section == "logger" else section
            line = [f"{section}={name}"] if section in SECTIONS else []
            for spec in settings(section, name):
                key = spec.key[:-2] + spec.key[-1]
                if len(key) > 2:
                    yield [*line, f"{prefix}.{key}=1"], f"{prefix}.{spec.key}"
    for key in (*SECTIONS, "mode", "training", "trainer", "checkpoint", "logger", "callbacks", "evaluate_on"):
        yield [f"{key[:-2]}{key[-1]}=1"], key
    yield ["logger.tensorbord.a=1"], "tensorboard"
    yield ["algo=ewcc"], "ewc"


def test_the_nearest_name_is_suggested_for_every_key() -> None:
    for line, correct in misspelled():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            built(line)
        hint = str(error.value).rpartition("; ")[2]
        assert f"did you mean {correct}" in hint or "it belongs to" in hint, (line, hint)


INCOMPATIBLE: list[tuple[list[str], tuple[str, ...]]] = [
    (["backbone.widths=[8]", "backbone.width=9"], ("backbone.widths", "backbone.width")),
    (["backbone.widths=[8]", "backbone.n_hidden_layers=2"], ("backbone.widths", "backbone.n_hidden_layers")),
    (["backbone=cnn", "backbone.max_pool=true"], ("max_pool", "stride=1")),
    (["backbone=cnn", "backbone.norm_groups=8"], ("norm_groups=8", "norm=none")),
    (["backbone=cnn", "backbone.norm=group", "backbone.norm_groups=5"], ("norm_groups=5", "channels 32, 64")),
    (["backbone=resnet18", "backbone.norm_groups=8"], ("norm_groups=8", "norm=batch")),
    (["backbone=torchvision", "mode=jax"], ("backbone=torchvision", "mode=jax")),
    (["backbone.num_classes=7"], ("backbone.num_classes", "benchmark's 10")),
    (["algo.lr_decay=0.5", "optimizer.lr_decay=0.4"], ("algo.lr_decay", "optimizer.lr_decay")),
    (["benchmark.batch_size=5", "training.batch_size=6"], ("training.batch_size", "benchmark.batch_size")),
    (["seed=1", "training.seed=2"], ("training.seed", "seed")),
    (["optimizer.lr=1", "optimizer.learning_rate=2"], ("optimizer.lr", "optimizer.learning_rate")),
    (["optimizer=adam", "optimizer.momentum=0.9"], ("optimizer.momentum", "adam", "sgd")),
    (["optimizer.beta1=0.5"], ("optimizer.beta1", "sgd", "adam, adamw")),
    (["optimizer.nesterov=true"], ("nesterov", "momentum")),
    (["algo=ewc", "algo.gamma=0.5"], ("algo.gamma", "accumulation=separate")),
    (["algo=er", "algo.mem_size=9", "algo.per_task_memory_samples=3"], ("per_task_memory_samples=3", "=9")),
    (["algo=er", "algo.mem_size=5"], ("mem_size", "batch_size=10")),
    (["algo=er", "algo.mem_batch_size=500"], ("mem_batch_size", "mem_size", "200")),
    (["algo=er", "algo.memory=task_quota", "algo.mem_size=201"], ("mem_size", "memory=task_quota")),
    (["algo=mcsgd", "algo.lmc_policy=online", "algo.lmc_epochs=3"], ("lmc_epochs=3", "lmc_policy=online")),
    (["algo=mcsgd", "algo.lmc_policy=online", "algo.lmc_steps=epoch"], ("steps=epoch", "lmc_policy=online")),
    (["algo=lamaml", "training.grad_clip=1"], ("grad_clip_norm", "grad_clip=1")),
    (["algo=lamaml", "algo.lr_decay=0.5"], ("lr_decay", "sync_update")),
    (["algo=lamaml", "algo.n_inner_updates=3"], ("n_inner_updates", "batch_size=10")),
    (["algo=lamaml", "algo.learn_lr=false", "algo.lr_alpha=1"], ("lr_alpha=1.0", "learn_lr=false")),
    (["algo=icarl", "algo.mem_size=5"], ("mem_size", "class")),
    (["algo=kcl", "algo.task_given=true", "algo.core_size=201"], ("core_size", "10 classes")),
    (["algo=kcl"], ("algo.task_given", "domain scenario", "false", "scenario=task")),
    (["algo=kcl", "benchmark=splitdigits", "benchmark.scenario=class"], ("kcl", "class", "scenario=task")),
    (["algo=kcl", "algo.bandwidth=2"], ("bandwidth=2.0", "kernel_type=rff")),
    (["algo=kcl", "algo.kernel_type=rbf", "algo.tau=1"], ("tau=1.0", "kernel_type=rbf")),
    (["algo=kcl", "algo.kernel_type=rbf", "algo.d_rn_f=10"], ("d_rn_f=10", "kernel_type=rbf")),
    (["training.batch_size=9999"], ("batch_size", "training samples")),
    (["training.epochs_per_task=[1,2]"], ("training.epochs_per_task", "2 entries", "task")),
    (["checkpoint.keep=0", "checkpoint.every_n_steps=5"], ("checkpoint.every_n_steps", "keep=0")),
    (["checkpoint.keep=0", "checkpoint.every_minutes=5"], ("checkpoint.every_minutes", "keep=0")),
    (["evaluate_on=validation"], ("evaluate_on=validation", "benchmark.validation")),
    (["benchmark.angles=[1,2]"], ("benchmark.angles", "num_tasks")),
    (["benchmark.angles=[1]", "benchmark.num_tasks=1", "benchmark.rotation=bins"], ("angles", "=bins")),
    (["benchmark.rotation=uniform", "benchmark.per_task_rotation=9"], ("per_task_rotation", "=uniform")),
    (["benchmark.scenario=class"], ("benchmark.scenario", "split benchmark")),
    (["benchmark=splitdigits", "benchmark.num_tasks=3"], ("benchmark.num_tasks", "10 classes")),
    (["benchmark=splitdigits", "benchmark.class_order=[1]"], ("benchmark.class_order", "0..9")),
    (["benchmark.subset=5000"], ("benchmark.subset", "training samples")),
    (["benchmark.validation=0.00001"], ("benchmark.validation", "training samples")),
    (["mode=jax", "trainer.precision=16"], ("trainer.precision", "mode=jax")),
    (["algo=ewc", "algo._target_=a.B"], ("algo", "algo._target_")),
    (["FILE", "experiment=naive_rotateddigits"], ("FILE", "experiment=NAME")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "names"), INCOMPATIBLE, ids=[" ".join(line) for line, _ in INCOMPATIBLE])
def test_an_error_names_incompatible_settings(
    sandbox: Sandbox, line: list[str], names: tuple[str, ...]
) -> None:
    file = sandbox.given / "experiment.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build_benchmark(compose([str(file) if text == "FILE" else text for text in line]).config)
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_compatible_settings(sandbox: Sandbox) -> None:
    """The same settings are valid if the other setting is changed."""
    for line in (
        ["backbone.widths=[9]", "backbone.width=9"],
        ["backbone=cnn", "backbone.max_pool=true", "backbone.stride=1"],
        ["backbone=cnn", "backbone.norm=group", "backbone.norm_groups=8"],
        ["optimizer=adam", "optimizer.beta1=0.5"],
        ["optimizer.nesterov=true", "optimizer.momentum=0.9"],
        ["algo=ewc", "algo.gamma=0.5", "algo.accumulation=online"],
        ["algo=er", "algo.mem_size=200", "algo.per_task_memory_samples=30"],
        ["algo=er", "algo.mem_size=100", "algo.per_task_memory_samples=null"],
        ["algo=mcsgd", "algo.lmc_epochs=3", "algo.lmc_steps=epoch"],
        ["algo=kcl", "algo.kernel_type=rbf", "algo.bandwidth=2", "algo.task_given=true"],
        ["algo=lamaml", "algo.learn_lr=false", "algo.lr_alpha=0.3"],
        ["evaluate_on=validation", "benchmark.validation=0.1"],
        ["checkpoint.keep=0"],
        ["checkpoint.every_n_steps=5", "checkpoint.keep=1"],
    ):
        build_benchmark(compose(line).config)
