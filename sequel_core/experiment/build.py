"""From canonical values to a checked experiment, and from an experiment to its benchmark and callbacks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sequel_core.backbones import FOR_TOKENS, MAX_UNITS, BackboneHParams, MLPHParams
from sequel_core.experiment.aliases import SECTIONS, SHAPE, Layer, nest, spelling
from sequel_core.experiment.schema import (
    CLASSES,
    DOCUMENTATION,
    EVALUATION,
    BenchmarkConfig,
    Expected,
    ExperimentConfig,
    benchmarks,
    callback_class,
    check_callback,
    choices,
    settings,
    settings_class,
    user_hparams,
)
from sequel_core.experiment.target import TARGET, Target, read
from sequel_core.hparams import TrainingHParams
from sequel_core.objectives import ACCURACY, SCORES, Score
from sequel_core.runs import learner
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.files import plain
from sequel_core.runs.learner import Mode
from sequel_core.runs.services import MASK
from sequel_core.settings import Settings, check_name, nearest, setting
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.plan import check_batch_size
from sequel_core.stream.trees import LeafSpec, specs_text

SUPPLIED = {
    "backbone": ("num_classes", "image_shape", "rngs"),
    "benchmark": ("batch_size", "eval_batch_size"),
    "logger": ("save_dir", "log_dir", "logdir", "directory"),
    "callbacks": ("directory",),
}
"""Arguments of user code that it is given, by name, if its signature has them."""


@dataclass(frozen=True)
class Shape(Settings):
    """The shape of a multi-layer perceptron, as an alternative to `widths`."""

    width: int | None = setting(None, "number of units of every hidden layer", ge=1, le=MAX_UNITS)
    n_hidden_layers: int | None = setting(None, "number of hidden layers", ge=1, le=1000)


def user_code(section: str, values: Mapping[str, Any], mode: Mode) -> Target:
    """Return what the `_target_` of a section names, with its arguments in the spelling of its signature.

    Raises:
        ValueError: the path names nothing, an import fails, or the plug-in is not installed.
    """
    learner.plugin(mode)  # first, because it must set up torchvision before any other import of it
    target = read(section, values)
    known = {spec.key for spec in settings(section, target)}
    return replace(target, arguments={spelling(section, k, known): v for k, v in target.arguments.items()})


def drop_foreign(layer: Layer, section: str, name: str | Target) -> list[str]:
    """Remove the settings of a section that its choice `name` does not have; return their keys."""
    known = {spec.key for spec in settings(section, name)}
    paths = {path: path.split(".")[1] for path in layer if path.startswith(f"{section}.")}
    if isinstance(name, Target):
        kept = {TARGET, *known}
        paths = {path: spelling(section, key, known) for path, key in paths.items()}
    else:
        kept = {SECTIONS[section], *known, *(SHAPE if name == "mlp" else ())}
    if section == "backbone" and not isinstance(name, Target):
        kept |= {"num_classes"}
    foreign = [path for path, key in paths.items() if key not in kept]
    for path in foreign:
        del layer[path]
    return [path for path in foreign if path.split(".")[1] not in (TARGET, SECTIONS[section])]


def build(flat: Layer) -> ExperimentConfig:
    """Return the experiment that merged canonical values describe.

    Raises:
        ValueError: an unknown name or key, with the nearest one, or a value out of range.
    """
    for path, value in flat.items():
        if value == MASK:
            raise ValueError(f"{path} was masked when the run was recorded, as a secret; give it a value")
    values = nest(flat)
    _check_top(values)
    mode = values.get("mode", "pytorch")
    chosen: dict[str, Any] = {}
    code: dict[str, Target] = {}
    for section in dict.fromkeys((*SECTIONS, *CLASSES)):
        group = dict(values.get(section, {}))
        if TARGET not in group or section not in (*SECTIONS, "objective"):
            chosen[section] = _chosen(section, group)
            continue
        target = code[section] = user_code(section, group, mode)
        _check_user_code(section, target, mode)
        if section == "algo":
            chosen[section] = _settings(user_hparams(target), section, target.arguments)
        elif section == "benchmark":
            chosen[section] = BenchmarkConfig(target.path, target.arguments)
    trainer = vars(chosen.pop("trainer"))
    chosen |= {key: values[key] for key in EVALUATION if key in values}
    chosen |= {key: str(values[key]) for key in DOCUMENTATION[1:] if key in values}
    return ExperimentConfig(
        mode=mode,
        trainer={key: plain(key, trainer[key], as_text=True) for key in values.get("trainer", {})},
        logger=_loggers(values.get("logger"), mode),
        callbacks=tuple(_targets("callbacks", values.get("callbacks"), mode).values()),
        user_code=code,
        num_classes=values["backbone"].get("num_classes"),
        expected=_expected(values.get("expected") or {}),
        **chosen,
    )


def _chosen(section: str, group: dict[str, Any]) -> Any:
    """Return the settings of a section, whose choice is built in."""
    name = ""
    if section in SECTIONS:
        name = group.pop(SECTIONS[section], None)
        check_name(section, name, choices(section))
    if section == "backbone":
        group.pop("num_classes", None)
        _widths(group)
    _check_keys(section, group, name)
    arguments = {"type": name, **group} if name and section in CLASSES else group
    chosen = _settings(settings_class(section, name), section, arguments)
    if section != "benchmark":
        return chosen
    return BenchmarkConfig(name, {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()})


def _expected(values: Any) -> dict[str, Any]:
    """Return the expected results; those that `Expected` names are checked."""
    if not isinstance(values, Mapping):
        raise ValueError(f"expected must be a group such as `avg_acc: 46.3`, got {values!r}")
    known = {spec.name for spec in fields(Expected)}
    _settings(Expected, "expected", {key: value for key, value in values.items() if key in known})
    return dict(values)


def _check_top(values: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown key at the top of a configuration, or a section that is no group."""
    sections = (*SECTIONS, *CLASSES)
    known = ("mode", *dict.fromkeys(sections), "logger", "callbacks", *EVALUATION, *DOCUMENTATION)
    for key, value in values.items():
        if key not in known:
            paths = {"seed": "seed"}
            for section in sections:
                for name in choices(section) if section in SECTIONS else [""]:
                    paths |= {spec.key: f"{section}.{spec.key}" for spec in settings(section, name)}
            hint = nearest(key, paths | {name: name for name in known})
            names = ", ".join(known)
            raise ValueError(f"{key} is not a setting{hint or f'; there are {names}'}")
        if key in sections and not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a group of settings, got {value!r}")


def _check_keys(section: str, group: Mapping[str, Any], name: str | Target) -> None:
    """Raise ValueError for the first key that is not a setting, with the nearest one and its range."""
    ranges = {spec.key: f" ({spec.allowed})".removesuffix(" ()") for spec in settings(section, name)}
    unknown = [key for key in group if key not in ranges]
    if unknown:
        key, prefix = unknown[0], f"logger.{name}" if section == "logger" else section
        others = choices(section) if isinstance(name, str) and name else []
        others = [other for other in others if key in {spec.key for spec in settings(section, other)}]
        hint = f"; it belongs to {', '.join(others)}"
        if not others:
            hint = nearest(key, {known: f"{prefix}.{known}{text}" for known, text in ranges.items()})
        hint = hint or f"; its settings are {', '.join(ranges) or 'none'}"
        owner = name.path if isinstance(name, Target) else name or section
        raise ValueError(f"{prefix}.{key} is not a setting of {owner}{hint}")


def _check_user_code(section: str, target: Target, mode: Mode) -> None:
    """Raise ValueError if user code cannot be called as its section does, or lacks an argument."""
    if section == "algo":
        wanted, fits = "a ContinualModule", inspect.isclass(target.function)
        if mode == "jax":
            wanted, fits = "a function (hparams, seed) -> Algorithm", "seed" in target.parameters
        if not fits:
            raise ValueError(
                f"{section}.{TARGET} must be {wanted} with mode={mode}, got {target.path}; a file for both "
                "modes can write ${mode} within the path"
            )
        _check_keys(section, target.arguments, target)
    elif section == "optimizer" and mode == "pytorch":
        target.check(list(target.named)[:1])  # the parameters of the network
    else:
        target.check(SUPPLIED.get(section, ()))


@contextmanager
def _named(section: str, known: Collection[str] | None = None) -> Iterator[None]:
    """Put the section before the message of a ValueError whose first word is a known setting."""
    try:
        yield
    except ValueError as error:
        named = known is None or str(error).partition(" ")[0] in known
        raise ValueError(f"{section}.{error}" if named else str(error)) from error


def _settings(cls: type[Settings], section: str, group: Mapping[str, Any]) -> Any:
    with _named(section):
        return cls(**group)


def _widths(group: dict[str, Any]) -> None:
    """Replace `width` and `n_hidden_layers` by `widths`."""
    width, count = group.pop("width", None), group.pop("n_hidden_layers", None)
    with _named("backbone"):
        Shape(width, count)
    if width is None and count is None:
        return
    widths = group.get("widths", MLPHParams().widths)
    if not isinstance(widths, list | tuple):
        raise ValueError(f"backbone.widths must be a list, got {widths!r}")
    if width is None:
        if len({repr(units) for units in widths}) != 1:
            raise ValueError(
                f"backbone.n_hidden_layers needs backbone.width, got widths {list(widths)}; "
                "give widths instead"
            )
        width = widths[0]
    group["widths"] = (width,) * (len(widths) if count is None else count)


def _targets(key: str, value: Any, mode: Mode) -> dict[str, Target]:
    """Return the targets of `logger` or `callbacks`: None, one, a list of them, or a mapping of names."""
    items: Mapping[str, Any] = {key: value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and TARGET not in value:
        items = {f"{key}.{name}": item for name, item in value.items()}
    targets = {}
    for name, item in items.items():
        if item is None:  # `callbacks.early=null` removes the one of a file
            continue
        if not isinstance(item, Mapping) or TARGET not in item:
            raise ValueError(f"{name} must be settings with `{TARGET}`, or null, got {item!r}")
        targets[name] = user_code(name, item, mode)
        targets[name].check(SUPPLIED[key])
    return targets


def _loggers(values: Any, mode: Mode) -> dict[str, Target | Mapping[str, Any]]:
    """Return the loggers by name; null removes one of a file."""
    if not isinstance(values, Mapping) or TARGET in values:
        return {str(i): target for i, target in enumerate(_targets("logger", values, mode).values())}
    known = choices("logger")
    loggers: dict[str, Target | Mapping[str, Any]] = {}
    for name, item in values.items():
        if isinstance(item, Mapping) and TARGET in item:
            (loggers[name],) = _targets("logger", {name: item}, mode).values()
        elif name in known and isinstance(item, Mapping):
            _check_keys("logger", item, name)
            loggers[name] = {spec.key: item.get(spec.key, spec.default) for spec in settings("logger", name)}
        elif item is not None:
            raise ValueError(
                f"logger must be one of {', '.join(known)}, or settings with `{TARGET}`, got "
                f"{item if name in known else name!r}{nearest(name, set(known) - {name})}"
            )
    return loggers


def build_callbacks(config: ExperimentConfig, run_dir: Path) -> tuple[list[StreamCallback], list[Any]]:
    """Make the callbacks of an experiment.

    Args:
        config: the experiment.
        run_dir: directory of the run, for callbacks with an argument `directory`.

    Returns:
        The callbacks for `sequel_core.run`, and those for the learner. One that is both is in both lists.

    Raises:
        ValueError: one is neither, or the code raises it.
    """
    callbacks = [target.make(directory=os.fspath(run_dir)) for target in config.callbacks]
    for target, callback in zip(config.callbacks, callbacks, strict=True):
        check_callback(target, type(callback), config.mode)
    return (
        [callback for callback in callbacks if isinstance(callback, StreamCallback)],
        [callback for callback in callbacks if isinstance(callback, callback_class(config.mode))],
    )


def build_benchmark(config: ExperimentConfig) -> Benchmark:
    """Make the benchmark of an experiment, and check the settings that depend on it, before any training.

    Raises:
        ValueError: an argument is out of range; data is missing or damaged; `num_classes` is not that of the
            benchmark; a batch is larger than a task; `epochs_per_task` has too few entries; a setting of the
            algorithm does not fit the batch or the stream; or there are no validation samples to evaluate on.
    """
    name, arguments = config.benchmark
    if "benchmark" in config.user_code:
        benchmark = user_benchmark(config.user_code["benchmark"], config.training)
    else:
        with _named("benchmark", {spec.key for spec in settings("benchmark", name)}):
            benchmark = benchmarks()[name](**arguments)
    if config.num_classes not in (None, benchmark.num_classes):
        raise ValueError(
            f"backbone.num_classes must be the benchmark's {benchmark.num_classes}, "
            f"got {config.num_classes!r}; leave it out"
        )
    if "backbone" not in config.user_code:
        with _named("backbone", {"vocab_size"}):
            _check_inputs(config.backbone, benchmark)
    if "objective" not in config.user_code:
        with _named("objective", {spec.name for spec in fields(config.objective)}):
            config.objective.resolved(benchmark.spec)
    with _named("training"):
        config.training.epochs(len(benchmark) - 1)
    with _named("algo", {spec.name for spec in fields(config.algo)}):
        config.algo.check(benchmark.spec, config.training)
        stages = list(config.algo.training_tasks(benchmark, config.training.seed))
    for task in stages:
        check_batch_size(task.index, len(task.train), config.training.batch_size, config.training.drop_last)
    empty = next((task.index for task in benchmark.tasks if len(task.validation) == 0), None)
    if config.evaluate_on == "validation" and empty is not None:
        raise ValueError(
            f"evaluate_on=validation needs validation samples, got none in task {empty}; "
            "set benchmark.validation, for example to 0.1"
        )
    return benchmark


def score_of(config: ExperimentConfig, spec: StreamSpec) -> Score:
    """Return the score that an experiment measures on a stream.

    Raises:
        ValueError: the objective does not fit the stream, or user code raises it.
    """
    if "objective" in config.user_code:
        score: Score = getattr(config.user_code["objective"].make(), "score", ACCURACY)
        return score
    return SCORES[config.objective.resolved(spec).type]


def _check_inputs(backbone: BackboneHParams, benchmark: Benchmark) -> None:
    """Raise ValueError unless a built-in network takes the inputs of the stream."""
    spec, name = benchmark.spec, backbone.type
    tokens = _token_ids(spec.x)
    fits = spec.images or (name == "mlp" and isinstance(spec.x, LeafSpec))
    if name in FOR_TOKENS:
        fits = tokens is not None and len(tokens.shape) == 1 and np.dtype(tokens.dtype).kind in "iu"
    if not fits:
        needs = "one input array" if name == "mlp" else "images [H, W, C]"
        if name in FOR_TOKENS:
            needs = "integers [L], or a dict of them called input_ids, and attention_mask if there is padding"
        remedy = " or backbone=mlp" if isinstance(spec.x, LeafSpec) else ""
        remedy = " or backbone=transformer" if isinstance(spec.x, Mapping) and tokens else remedy
        raise ValueError(
            f"backbone={name} needs {needs}, benchmark {benchmark.name} has {specs_text(spec.x)}; use "
            f"a network of your own{remedy}"
        )
    if name in FOR_TOKENS:
        splits = [split for task in benchmark.tasks for split in (task.train, task.validation, task.test)]
        ids = [_token_ids(part.x) for split in splits for part in split.parts]
        largest = max(int(array.max(initial=0)) for array in ids if isinstance(array, np.ndarray))
        vocab_size = getattr(backbone, "vocab_size", 0)
        if largest >= vocab_size:
            raise ValueError(f"vocab_size must be > the largest token id {largest}, got {vocab_size}")


def _token_ids(x: Any) -> Any:
    """Return the token ids in the inputs of a network, or in their specification; None if there are none."""
    if not isinstance(x, Mapping):
        return x
    return x.get("input_ids") if x.keys() <= {"input_ids", "attention_mask"} else None


def user_benchmark(target: Target, training: TrainingHParams) -> Benchmark:
    """Return the stream that user code makes: a Benchmark, or an object with `prepare_datasets()`.

    Raises:
        ValueError: the code makes something else, or raises it.
    """
    made = target.make(batch_size=training.batch_size, eval_batch_size=training.eval_batch_size)
    if isinstance(made, Benchmark):
        return made
    if not hasattr(made, "prepare_datasets"):
        raise ValueError(
            f"{target.key}.{TARGET} must give a Benchmark or an object with prepare_datasets(), got a "
            f"{type(made).__name__} from {target.path}"
        )
    benchmark: Benchmark = import_module("sequel_benchmarks").from_prepared(made)
    return benchmark
