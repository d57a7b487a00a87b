"""The configuration of one experiment: its schema, the spellings it accepts, and its checks.

A configuration is handled as *layers* of flat values (`{"algo.name": "ewc", "optimizer.lr": 0.01, ...}`): the
groups', the file's and the command line's, each brought to one spelling by `canonical`, joined by `merge` and
checked by `build`.

A group of settings may hold `_target_`, the dotted path of the user's own code, in place of a name; see
`sequel_core.experiment.target`.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.backbones import BACKBONES, MOST_UNITS, BackboneHParams, MLPHParams
from sequel_core.experiment.target import TARGET, Target, hints_of, read
from sequel_core.experiment.target import nearest as nearest
from sequel_core.hparams import (
    AlgorithmHParams,
    CheckpointHParams,
    OptimizerHParams,
    TrainerHParams,
    TrainingHParams,
)
from sequel_core.runs import learner
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.learner import PLUGINS, EvaluateEvery, Mode
from sequel_core.runs.services import MASK, PACKAGES, check_service, masked
from sequel_core.settings import Settings, allowed
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.plan import check_batch_size

S = TypeVar("S", bound=Settings)
EvaluateOn = Literal["test", "validation"]

SECTIONS = {"algo": "name", "benchmark": "name", "backbone": "type", "optimizer": "type"}
"""The groups that a name selects, and the key that holds the name in a file."""

SPELLINGS = {
    "seed": "training.seed",
    "training.epoch_per_task": "training.epochs_per_task",
    "benchmark.batch_size": "training.batch_size",
    "benchmark.eval_batch_size": "training.eval_batch_size",
    "optimizer.lr_decay": "algo.lr_decay",
    "optimizer.learning_rate": "optimizer.lr",
    "algo.type": "algo.name",
    "algo.memory_size": "algo.mem_size",
    "algo.memory_batch_size": "algo.mem_batch_size",
    "algo.memory_group_by": "algo.memory",
    "benchmark.type": "benchmark.name",
    "benchmark.fixed_class_order": "benchmark.class_order",
    "backbone.name": "backbone.type",
    "backbone.linear_layers": "backbone.linear_widths",
    "backbone.use_maxpool": "backbone.max_pool",
    "optimizer.name": "optimizer.type",
}
"""Keys that the paper's files, the original library or the command line spell differently."""

NAMES = {
    "mode": {"lightning": "pytorch", "torch": "pytorch", "flax": "jax"},
    "algo.name": {
        "der++": "derpp",
        "stablesgd": "stable_sgd",
        "stable-sgd": "stable_sgd",
        "a-gem": "agem",
        "mc-sgd": "mcsgd",
        "la-maml": "lamaml",
    },
    "benchmark.name": {
        "tinyimagenet": "splittinyimagenet",
        "cifar10": "splitcifar10",
        "cifar100": "splitcifar100",
    },
    "backbone.type": {"resnet18thin": "resnet18_thin"},
    "algo.memory": {"task": "task_quota", "uniform": "task_quota", "class": "class_quota"},
}
"""Values that are spelt differently."""

TRAINER = {spec.name: spec.default for spec in fields(TrainerHParams)}
"""Settings of Lightning's Trainer that a configuration may give, with their defaults."""

EVALUATION = ("evaluate_every", "evaluate_on", "evaluate_future")
OBJECTS = ("logger", "callbacks")
CALLBACKS: dict[Mode, str] = {"pytorch": "pytorch_lightning.Callback", "jax": "sequel_flax.hooks.Hook"}
"""What looks into the training in each mode, beside the StreamCallback of both."""
DOCUMENTATION = ("expected", "version", "source", "comment")
SPREAD = ("std", "runs", "tolerance")
"""What `expected` says of its `avg_acc`: the published spread, and how far below it counts as reached."""
SHAPE = ("widths", "width", "n_hidden_layers")

SUPPLIED = {
    "backbone": ("num_classes", "image_shape", "rngs"),
    "benchmark": ("batch_size", "eval_batch_size"),
    "logger": ("save_dir", "log_dir", "logdir", "directory"),
    "callbacks": ("directory",),
}
"""What a user's own code need not be given, as it is known: where its signature has the name, it gets it."""

Layer = dict[str, Any]


class BenchmarkConfig(NamedTuple):
    """A benchmark by name, with the arguments that were given."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, checked.

    Args:
        mode: the framework, `pytorch` or `jax`.
        algo: the algorithm's settings.
        benchmark: the stream; its seed is `benchmark.arguments["seed"]`, apart from the training seed.
        backbone: the network's settings.
        optimizer: the optimizer's settings.
        training: batch sizes, epochs, seed, ...
        checkpoint: when checkpoints are written, and how many are kept.
        trainer: of Lightning's Trainer, see `TRAINER`; only with mode pytorch.
        logger: by name, the settings of one of `choices("logger")` or the user's own, which is a logger of
            Lightning's, or with mode jax a metric writer.
        callbacks: of the orchestrator, and with mode pytorch of Lightning's Trainer, with mode jax hooks.
        own: the user's own code, by section; it takes the place of a backbone's and an optimizer's settings,
            while the settings of an algorithm are the own ones of its class.
        evaluate_every: `task`, `epoch` or a number of steps >= 1.
        evaluate_on: the split that the accuracy matrix is measured on, `test` or `validation`.
        evaluate_future: evaluate the tasks not yet seen, too, as forward transfer needs.
        num_classes: of the backbone, where a file says it; must be the benchmark's.
        expected: published results, recorded and printed beside the measured ones; `avg_acc` is in percent,
            and so are its `std` over `runs` and the `tolerance` of `sequel reproduce`.
        version: of the library that a file was written for; recorded only.
        source: of the expected results; recorded only.
        comment: recorded only.

    Raises:
        ValueError: a value out of range, or a setting that the mode cannot use.
    """

    mode: Mode = "pytorch"
    algo: AlgorithmHParams = field(default_factory=NaiveHParams)
    benchmark: BenchmarkConfig = field(default_factory=lambda: BenchmarkConfig("rotateddigits", {}))
    backbone: BackboneHParams = field(default_factory=MLPHParams)
    optimizer: OptimizerHParams = field(default_factory=OptimizerHParams)
    training: TrainingHParams = field(default_factory=TrainingHParams)
    checkpoint: CheckpointHParams = field(default_factory=CheckpointHParams)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    logger: Mapping[str, Target | Mapping[str, Any]] = field(default_factory=dict)
    callbacks: tuple[Target, ...] = ()
    own: Mapping[str, Target] = field(default_factory=dict)
    evaluate_every: EvaluateEvery = "task"
    evaluate_on: EvaluateOn = "test"
    evaluate_future: bool = False
    num_classes: int | None = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    source: str | None = None
    comment: str | None = None

    def __post_init__(self) -> None:
        check_name("mode", self.mode, PLUGINS)
        every = self.evaluate_every
        if every not in ("task", "epoch") and not (_whole(every) and int(every) >= 1):
            raise ValueError(f"evaluate_every must be task, epoch or a number of steps >= 1, got {every!r}")
        check_name("evaluate_on", self.evaluate_on, get_args(EvaluateOn))
        if not isinstance(self.evaluate_future, bool):
            raise ValueError(f"evaluate_future must be true or false, got {self.evaluate_future!r}")
        changed = [key for key, value in self.trainer.items() if value != TRAINER.get(key)]
        if self.mode == "jax" and changed:
            raise ValueError(
                f"trainer.{changed[0]} is a setting of Lightning's Trainer, got {self.trainer[changed[0]]!r} "
                "with mode=jax; drop it or set mode=pytorch"
            )
        if self.mode not in self.backbone.modes:
            raise ValueError(
                f"backbone={self.backbone.type} needs mode={' or '.join(self.backbone.modes)}, as its models "
                f"are PyTorch's, got mode={self.mode}; choose another backbone, for example resnet18"
            )
        for target in self.callbacks:
            if inspect.isclass(target.function) and not target.partial:
                _check_callback(target, target.function, self.mode)
        for name in PACKAGES:
            found = self.logger.get(name)
            if found is not None and not isinstance(found, Target):
                check_service(name, found)

    def plain(self) -> dict[str, Any]:
        """Return all settings, defaults included, as plain values under the names that a file gives them.

        What may be a secret is masked, see `sequel_core.runs.services.masked`.
        """
        values: dict[str, Any] = {"mode": self.mode}
        if "algo" in self.own:
            values["algo"] = {TARGET: self.own["algo"].path, **asdict(self.algo)}
        else:
            values["algo"] = {"name": self.algo.name, **asdict(self.algo)}
        if "benchmark" in self.own:
            values["benchmark"] = self.own["benchmark"].plain()
        else:
            stream = {spec.key: spec.default for spec in settings("benchmark", self.benchmark.name)}
            values["benchmark"] = {"name": self.benchmark.name, **stream, **self.benchmark.arguments}
        values["backbone"] = {"type": self.backbone.type, **asdict(self.backbone)}
        values["optimizer"] = {
            "type": self.optimizer.type,
            **{s.key: getattr(self.optimizer, s.key) for s in settings("optimizer", self.optimizer.type)},
        }
        values |= {key: self.own[key].plain() for key in ("backbone", "optimizer") if key in self.own}
        values |= {
            "training": asdict(self.training),
            "checkpoint": asdict(self.checkpoint),
            "trainer": dict(self.trainer),
            "logger": {k: v.plain() if isinstance(v, Target) else dict(v) for k, v in self.logger.items()},
            **({"callbacks": [target.plain() for target in self.callbacks]} if self.callbacks else {}),
            **{key: getattr(self, key) for key in EVALUATION},
            **{key: getattr(self, key) for key in DOCUMENTATION if getattr(self, key)},
        }
        return cast(dict[str, Any], masked(_plain(values)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Setting(NamedTuple):
    """What is known of one setting."""

    key: str
    default: Any
    allowed: str  # the range of a number, for example ">= 0", or the values to choose from; may be empty
    help: str


def _benchmarks() -> Mapping[str, Callable[..., Benchmark]]:
    table: Mapping[str, Callable[..., Benchmark]] = import_module("sequel_benchmarks").BENCHMARKS
    return table


def choices(section: str) -> list[str]:
    """Return the names that a section (`algo`, `benchmark`, `backbone`, `optimizer` or `logger`) can have."""
    if section == "benchmark":
        return list(_benchmarks())
    if section == "logger":
        return sorted(path.name.removesuffix(".yaml") for path in _logger_files().iterdir())
    if section == "optimizer":
        return list(get_args(get_type_hints(OptimizerHParams)["type"]))
    return list(ALGORITHMS) if section == "algo" else list(BACKBONES)


def settings(section: str, name: str | Target = "") -> list[Setting]:
    """Return the settings of a section, for the algorithm, benchmark, ... of this name.

    Args:
        section: `algo`, `benchmark`, `backbone`, `optimizer`, `logger`, `training` or `trainer`.
        name: one of `choices(section)` or the user's own code; not needed for the last two.
    """
    if isinstance(name, Target):
        if section == "algo":
            return _fields(user_hparams(name))
        return [
            Setting(key, None if parameter.default is parameter.empty else parameter.default, "", "")
            for key, parameter in name.named.items()
        ]
    if section == "benchmark":
        return _arguments(_benchmarks()[name])
    if section == "algo":
        return _fields(ALGORITHMS[name])
    if section == "backbone":
        return _fields(BACKBONES[name])
    if section == "optimizer":
        foreign = ("beta1", "beta2", "eps") if name == "sgd" else ("momentum", "nesterov")
        return [spec for spec in _fields(OptimizerHParams) if spec.key not in ("type", *foreign)]
    if section == "training":
        return _fields(TrainingHParams)
    if section == "checkpoint":
        return _fields(CheckpointHParams)
    if section == "logger":
        text = _logger_files().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        remarks = {line.partition(":")[0].strip(): line.partition(" # ")[2] for line in text.splitlines()}
        values = yaml.safe_load(text)[name]
        return [Setting(key, default, "", remarks.get(key, "")) for key, default in values.items()]
    return _fields(TrainerHParams)


def _logger_files() -> Traversable:
    """Return the folder of the Hydra group that holds each logger's settings, defaults and their meaning."""
    return resources.files("sequel_configs").joinpath("logger")


def _fields(cls: type[Settings]) -> list[Setting]:
    hints = get_type_hints(cls)
    return [
        Setting(
            spec.name,
            spec.default,
            allowed(spec) or ", ".join(_literals(hints[spec.name])),
            spec.metadata.get("help", ""),
        )
        for spec in fields(cls)
    ]


def _literals(hint: Any) -> list[str]:
    """Return the values of the Literals in an annotation; a tuple's items do not count."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return [value for option in get_args(hint) for value in _literals(option)]
    return []


def _arguments(function: Callable[..., Any]) -> list[Setting]:
    """Return the settings that a benchmark's signature and docstring describe."""
    types, text = hints_of(function), inspect.getdoc(function) or ""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            lines = text.partition("Args:")[2].splitlines()
            heads = [i for i, line in enumerate(lines) if line.strip().startswith(f"{parameter.name}:")]
            words = ""
            for start in heads[:1]:
                indent = len(lines[start]) - len(lines[start].lstrip())
                words = lines[start].partition(":")[2].strip()
                for line in lines[start + 1 :]:
                    if len(line) - len(line.lstrip()) <= indent:
                        break
                    words += f" {line.strip()}"
            default = None if parameter.default is parameter.empty else parameter.default
            rule = ", ".join(_literals(types.get(parameter.name)))
            found.append(Setting(parameter.name, default, rule, words))
    return found


def user_code(section: str, values: Mapping[str, Any], mode: Mode) -> Target:
    """Return what the `_target_` of a section names, with its arguments in the spelling of its signature.

    The plug-in is imported first, as what it does for torchvision has to come before any other import of it.

    Raises:
        ValueError: no such module or name, an import that fails, or no plug-in.
    """
    check_name("mode", mode, PLUGINS)
    learner.plugin(mode)
    target = read(section, values)
    known = {spec.key for spec in settings(section, target)}
    return replace(target, arguments={_spelling(section, k, known): v for k, v in target.arguments.items()})


def user_hparams(target: Target) -> type[AlgorithmHParams]:
    """Return the class of the settings of a user's own algorithm.

    It is a ContinualModule's `hparams_class`, or the annotation of the first parameter of a function
    `(hparams, seed) -> Algorithm`.

    Raises:
        ValueError: there is none, or it is not one of an algorithm's settings.
    """
    found = getattr(target.function, "hparams_class", None)
    if found is None:
        found = hints_of(target.function).get(next(iter(target.parameters), ""))
    if not (inspect.isclass(found) and issubclass(found, AlgorithmHParams) and hasattr(found, "name")):
        raise ValueError(
            f"{target.key}.{TARGET} must be a ContinualModule whose hparams_class, or a function (hparams, "
            "seed) -> Algorithm whose first annotation, is a subclass of AlgorithmHParams with a name, got "
            f"{target.path} with {getattr(found, '__name__', found)}"
        )
    return found


def _spelling(section: str, key: str, known: Collection[str]) -> str:
    """Return how those who know a key spell it: `learning_rate` where `lr` is not known."""
    path = f"{section}.{key}"
    others = [SPELLINGS.get(path, ""), *(old for old, new in SPELLINGS.items() if new == path)]
    names = [other.removeprefix(f"{section}.") for other in others if other.startswith(f"{section}.")]
    return next((name for name in (key, *names) if name in known), key)


def check_name(key: str, value: Any, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, where a value is not one of the names."""
    names = list(names)
    if value not in names:
        hint = nearest(str(value), names)
        raise ValueError(f"{key} must be one of {', '.join(names)}, got {value!r}{hint}")


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Layer:
    """Return nested values as a flat layer; an empty mapping stays a value."""
    flat: Layer = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def nest(flat: Layer) -> dict[str, Any]:
    """Return a flat layer as nested values."""
    values: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path} cannot be set: {parent} is a value, not a group of settings")
        inner[last] = value
    return values


def canonical(values: Mapping[str, Any]) -> Layer:
    """Return one layer's nested or flat values as a flat layer in the one spelling that `build` reads.

    Raises:
        ValueError: two spellings of one setting with different values.
    """
    layer = flatten(values)
    _spell_loggers(layer)
    names = set()  # keys that are the arguments of a user's own code, not the name of something built in
    for section, key in SECTIONS.items():
        if f"{section}.{TARGET}" in layer:
            if section in layer:
                raise ValueError(
                    f"{section} and {section}.{TARGET} differ: {layer[section]!r} and "
                    f"{layer[f'{section}.{TARGET}']!r}; give one of them"
                )
            names.add(f"{section}.{key}")
        if section in layer:
            value = layer.pop(section)
            if not isinstance(value, str):
                raise ValueError(f"{section} must be a name or settings with `{key}`, got {value!r}")
            _move(layer, section, value, f"{section}.{key}")
    for old, new in SPELLINGS.items():
        if old in layer and new not in names:
            _move(layer, old, layer.pop(old), new)
    for key in _NAMED - names:
        if isinstance(layer.get(key), str):
            layer[key] = alias(key, layer[key])
    widths = layer.get("backbone.widths")
    for key in SHAPE[1:]:
        if isinstance(widths, list | tuple) and f"backbone.{key}" in layer:
            value = layer.pop(f"backbone.{key}")
            if {*widths} != {value} if key == "width" else len(widths) != value:
                raise ValueError(
                    f"backbone.widths and backbone.{key} differ: {widths} and {value!r}; give one of them"
                )
    return layer


def _spell_loggers(layer: Layer) -> None:
    """Bring the choice of loggers to `logger.<name>.<setting>`; an empty mapping chooses one as it is.

    A file may have a name, a list of names and of settings with `_target_`, or a mapping; and, as in the
    paper, the section `wandb`.
    """
    chosen = layer.pop("logger", {})
    items = list(chosen) if isinstance(chosen, list | tuple) else [] if chosen in (None, {}) else [chosen]
    if items and f"logger.{TARGET}" in layer:
        raise ValueError(f"logger and logger.{TARGET} are both given: {chosen!r}; give a list with both")
    for i, item in enumerate(items):
        if isinstance(item, Mapping) and TARGET in item:
            layer |= flatten(item, f"logger.{i}.")
        elif isinstance(item, str):
            layer.setdefault(f"logger.{item}", {})
        else:
            raise ValueError(f"logger must be names or settings with `{TARGET}`, got {item!r}")
    if "wandb" in layer and not (layer["wandb"] is None or isinstance(layer["wandb"], Mapping)):
        raise ValueError(f"wandb must be a group of settings, got {layer['wandb']!r}")
    for path in [path for path in layer if path == "wandb" or path.startswith("wandb.")]:
        _move(layer, path, layer.pop(path), f"logger.{path}")
    for path in [path for path in layer if path.startswith("logger.") and layer[path] == {}]:
        if any(other.startswith(f"{path}.") for other in layer):
            del layer[path]
    if chosen is None and not any(path.startswith("logger.") for path in layer):
        layer["logger"] = None


def _move(layer: Layer, old: str, value: Any, new: str) -> None:
    if new in layer and alias(new, layer[new]) != alias(new, value):
        raise ValueError(f"{new} and {old} differ: {layer[new]!r} and {value!r}; give one of them")
    layer[new] = value


def alias(key: str, value: Any) -> Any:
    """Return the one spelling of a value of `mode`, `algo.name`, ...; anything but text as it is."""
    if not isinstance(value, str):
        return value
    return NAMES.get(key, {}).get(value.lower(), value.lower()) if key in _NAMED else value


_NAMED = {"mode", "algo.memory", *(f"{section}.{key}" for section, key in SECTIONS.items())}


def merge(*layers: Layer) -> Layer:
    """Join canonical layers, the later ones winning.

    A value for a whole group (`logger: null`) replaces its settings below, and the other way round, but where
    it only chooses a logger; `widths` replaces `width` and `n_hidden_layers` of lower layers.
    """
    merged: Layer = {}
    for layer in layers:
        chosen = [path for path in layer if path.startswith("logger.") and layer[path] == {}]
        values = {path: value for path, value in layer.items() if path not in chosen}
        for path in values:
            for other in list(merged):
                if (other.startswith(f"{path}.") and not (path == "logger" and layer[path])) or (
                    path.startswith(f"{other}.") and not merged[other]
                ):
                    del merged[other]
        if "backbone.widths" in layer or {"backbone.width", "backbone.n_hidden_layers"} <= layer.keys():
            for key in SHAPE:
                merged.pop(f"backbone.{key}", None)
        merged |= values
        for path in chosen:
            if not any(other.startswith(f"{path}.") for other in merged):
                merged[path] = {}
        if chosen:
            merged.pop("logger", None)
    return merged


def drop_foreign(layer: Layer, section: str, name: str | Target) -> list[str]:
    """Remove the settings of a section that its choice `name` does not have; return what was removed."""
    known = {spec.key for spec in settings(section, name)}
    if isinstance(name, Target):
        kept = {TARGET, *known}
    else:
        shape = SHAPE if name == "mlp" else ()
        kept = {SECTIONS[section], *known, *((*shape, "num_classes") if section == "backbone" else ())}
    foreign = []
    for path in [path for path in layer if path.startswith(f"{section}.")]:
        key = path.split(".")[1]
        if (_spelling(section, key, known) if isinstance(name, Target) else key) not in kept:
            del layer[path]
            foreign.append(path)
    return [path for path in foreign if path.split(".")[1] not in (TARGET, SECTIONS[section])]


def _widths(group: dict[str, Any]) -> None:
    """Replace `width` and `n_hidden_layers` by `widths`."""
    width, count = group.pop("width", None), group.pop("n_hidden_layers", None)
    for key, value, most in (("width", width, MOST_UNITS), ("n_hidden_layers", count, 1000)):
        if value is not None and not (_whole(value) and 1 <= value <= most):
            raise ValueError(f"backbone.{key} must be a whole number >= 1 and <= {most}, got {value!r}")
    if width is None and count is None:
        return
    known = group.get("widths", MLPHParams().widths)
    if not isinstance(known, list | tuple):
        raise ValueError(f"backbone.widths must be a list, got {known!r}")
    if count is None:
        count = len(known)
    if width is None:
        if len({repr(units) for units in known}) != 1:
            raise ValueError(
                f"backbone.n_hidden_layers needs backbone.width beside it, got widths {list(known)}; "
                "give widths instead"
            )
        width = known[0]
    group["widths"] = (width,) * count


def _check_keys(section: str, group: Mapping[str, Any], name: str | Target) -> None:
    """Raise ValueError at the first key that is not a setting, naming the nearest one with its range."""
    where = f"logger.{name}" if section == "logger" else section
    known = {spec.key: spec for spec in settings(section, name)}
    for key in group:
        if key in known:
            continue
        owner = name.path if isinstance(name, Target) else name or section
        others = [
            other
            for other in (choices(section) if name and isinstance(name, str) else [])
            if key in {spec.key for spec in settings(section, other)}
        ]
        match = difflib.get_close_matches(key, known, n=1)
        if others:
            hint = f"; it belongs to {', '.join(others)}"
        elif match:
            rule = known[match[0]].allowed
            hint = f"; did you mean {where}.{match[0]}{f' ({rule})' if rule else ''}?"
        else:
            hint = f"; its settings are {', '.join(known) or 'none'}"
        raise ValueError(f"{where}.{key} is not a setting of {owner}{hint}")


def _settings(cls: type[S], section: str, group: Mapping[str, Any]) -> S:
    try:
        return cls(**group)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error


def _argument(key: str, value: Any, hint: Any) -> Any:
    """Return a benchmark's argument in its annotation's type; ranges are checked by the benchmark itself."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is type(None) or get_origin(option) is os.PathLike:
                continue  # a file gives paths as text
            try:
                return _argument(key, value, option)
            except ValueError as error:
                errors.append(str(error))
        start = f"{key} must be "
        rules = " or ".join(error.removeprefix(start).partition(", got ")[0] for error in errors)
        raise ValueError(f"{start}{rules}, got {value!r}")
    if origin is Literal:
        if value not in args:
            check_name(key, value, map(str, args))
        return value
    if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{key} must be a list, got {value!r}")
        return tuple(_argument(key, item, args[0]) for item in value) if args else tuple(value)
    wanted: dict[Any, tuple[str, Callable[[Any], bool]]] = {
        bool: ("true or false", lambda v: isinstance(v, bool)),
        int: ("a whole number", _whole),
        float: ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
        str: ("text", lambda v: isinstance(v, str)),
    }
    if hint in wanted:
        rule, fits = wanted[hint]
        if not fits(value):
            raise ValueError(f"{key} must be {rule}, got {value!r}")
    return value


def _check_top(values: Mapping[str, Any]) -> None:
    groups = (*SECTIONS, "training", "checkpoint", "trainer")
    known = ("mode", *groups, *OBJECTS, *EVALUATION, *DOCUMENTATION)
    for key, value in values.items():
        if key not in known:
            inner = {"seed": "seed"}
            for section in groups:
                for name in choices(section) if section in SECTIONS else [""]:
                    inner |= {spec.key: f"{section}.{spec.key}" for spec in settings(section, name)}
            match = difflib.get_close_matches(key, [*known, *inner], n=1)
            if match:
                meant = match[0] if match[0] in known else inner[match[0]]
                raise ValueError(f"{key} is not a setting; did you mean {meant}?")
            raise ValueError(f"{key} is not a setting; there are {', '.join(known)}")
        if key in groups and not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a group of settings, got {value!r}")


def _check_own(section: str, target: Target, mode: Mode) -> None:
    """Refuse own code that cannot be called as its section does, and arguments that it does not take."""
    if section == "algo":
        fits = inspect.isclass(target.function) if mode == "pytorch" else "seed" in target.parameters
        if not fits:
            wanted = {"pytorch": "a ContinualModule", "jax": "a function (hparams, seed) -> Algorithm"}[mode]
            raise ValueError(
                f"{section}.{TARGET} must be {wanted} with mode={mode}, got {target.path}; a file for both "
                "modes can write ${mode} within the path"
            )
        _check_keys(section, target.arguments, target)
    elif section == "optimizer" and mode == "pytorch":
        target.check(list(target.named)[:1])  # the parameters of the network
    else:
        target.check(SUPPLIED.get(section, ()))


def _objects(key: str, value: Any, mode: Mode) -> tuple[Target, ...]:
    """Return the targets of `logger` or `callbacks`: None, one, a list of them, or a mapping of names."""
    items: Mapping[str, Any]
    if value is None:
        items = {}
    elif isinstance(value, Mapping):
        items = {key: value} if TARGET in value else {f"{key}.{name}": item for name, item in value.items()}
    elif isinstance(value, list | tuple):
        items = {f"{key}.{i}": item for i, item in enumerate(value)}
    else:
        items = {key: value}
    targets = []
    for name, item in items.items():
        if item is None:  # `callbacks.early=null` takes away what a file has
            continue
        if not isinstance(item, Mapping) or TARGET not in item:
            raise ValueError(f"{name} must be settings with `{TARGET}`, or null, got {item!r}")
        targets.append(user_code(name, item, mode))
        targets[-1].check(SUPPLIED.get(key, ()))
    return tuple(targets)


def _loggers(values: Any, mode: Mode) -> dict[str, Target | Mapping[str, Any]]:
    """Return the loggers by name; null takes one away that a file has."""
    if isinstance(values, Mapping) and TARGET not in values:
        named = {name: item for name, item in values.items() if item is not None}
        known = choices("logger")
        made: dict[str, Target | Mapping[str, Any]] = {}
        for name, item in named.items():
            if isinstance(item, Mapping) and TARGET in item:
                (made[name],) = _objects("logger", {name: item}, mode)
            elif name in known and isinstance(item, Mapping):
                _check_keys("logger", item, name)
                made[name] = {spec.key: item.get(spec.key, spec.default) for spec in settings("logger", name)}
            else:
                raise ValueError(
                    f"logger must be one of {', '.join(known)}, or settings with `{TARGET}`, got "
                    f"{item if name in known else name!r}{nearest(name, set(known) - {name})}"
                )
        return made
    return {str(i): target for i, target in enumerate(_objects("logger", values, mode))}


def build(flat: Layer) -> ExperimentConfig:
    """Return the experiment that merged canonical values describe.

    Raises:
        ValueError: an unknown name or key (the nearest one is suggested), or a value out of range.
    """
    for path, value in flat.items():
        if value == MASK:
            raise ValueError(f"{path} was masked where the run was recorded, as a secret; give it a value")
    values = nest(flat)
    for section, key in SECTIONS.items():
        if isinstance(values.get(section), Mapping) and TARGET not in values[section]:
            check_name(section, values[section].get(key), choices(section))
    _check_top(values)
    mode = values.get("mode", "pytorch")
    groups: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    own: dict[str, Target] = {}
    for section, key in SECTIONS.items():
        groups[section] = dict(values[section])
        if TARGET in groups[section]:
            own[section] = user_code(section, groups[section], mode)
        else:
            names[section] = groups[section].pop(key)
    num_classes = groups["backbone"].get("num_classes")
    if "backbone" in names:
        groups["backbone"].pop("num_classes", None)
        _widths(groups["backbone"])
    for section, name in names.items():
        _check_keys(section, groups[section], name)
    for section, target in own.items():
        _check_own(section, target, mode)
    for section in ("training", "checkpoint", "trainer"):
        groups[section] = dict(values.get(section, {}))
        _check_keys(section, groups[section], "")
    if "benchmark" in own:
        stream = BenchmarkConfig(own["benchmark"].path, own["benchmark"].arguments)
    else:
        types = hints_of(_benchmarks()[names["benchmark"]])
        given = groups["benchmark"].items()
        arguments = {key: _argument(f"benchmark.{key}", value, types.get(key)) for key, value in given}
        stream = BenchmarkConfig(names["benchmark"], arguments)
    expected = values.get("expected") or {}
    if not isinstance(expected, Mapping):
        raise ValueError(f"expected must be a group such as `avg_acc: 46.3`, got {expected!r}")
    average = expected.get("avg_acc", 0.0)
    if isinstance(average, bool) or not isinstance(average, int | float) or not 0 <= average <= 100:
        raise ValueError(f"expected.avg_acc must be a percentage >= 0 and <= 100, got {average!r}")
    for key in SPREAD:
        value = expected.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"expected.{key} must be a number >= 0, got {value!r}")
    trainer = _settings(TrainerHParams, "trainer", groups["trainer"])
    others: dict[str, Any] = {key: values[key] for key in EVALUATION if key in values}
    others |= {key: str(values[key]) for key in ("version", "source", "comment") if key in values}
    algo = user_hparams(own["algo"]) if "algo" in own else ALGORITHMS[names["algo"]]
    network = {} if "backbone" in own else groups["backbone"]
    optimizer = {} if "optimizer" in own else {"type": names["optimizer"], **groups["optimizer"]}
    return ExperimentConfig(
        mode=mode,
        algo=_settings(algo, "algo", own["algo"].arguments if "algo" in own else groups["algo"]),
        benchmark=stream,
        backbone=_settings(BACKBONES[names.get("backbone", MLPHParams.type)], "backbone", network),
        optimizer=_settings(OptimizerHParams, "optimizer", optimizer),
        training=_settings(TrainingHParams, "training", groups["training"]),
        checkpoint=_settings(CheckpointHParams, "checkpoint", groups["checkpoint"]),
        trainer={key: _plain(getattr(trainer, key)) for key in groups["trainer"]},
        logger=_loggers(values.get("logger"), mode),
        callbacks=_objects("callbacks", values.get("callbacks"), mode),
        own=own,
        num_classes=num_classes,
        expected=dict(expected),
        **others,
    )


def build_callbacks(config: ExperimentConfig, run_dir: Path) -> tuple[list[StreamCallback], list[Any]]:
    """Make the callbacks of an experiment.

    Args:
        config: checked.
        run_dir: for those that ask for a `directory`.

    Returns:
        Those for `sequel_core.run`, and those for the plug-in's learner; one of both kinds is in both.

    Raises:
        ValueError: one that is of neither kind, or the code refuses an argument.
    """
    made = [target.make(directory=os.fspath(run_dir)) for target in config.callbacks]
    for target, callback in zip(config.callbacks, made, strict=True):
        _check_callback(target, type(callback), config.mode)
    own = [callback for callback in made if issubclass(type(callback), _callback_class(config.mode))]
    return [callback for callback in made if isinstance(callback, StreamCallback)], own


def _check_callback(target: Target, found: type, mode: Mode) -> None:
    """Raise ValueError where a class is neither the orchestrator's kind of callback nor the mode's."""
    if not issubclass(found, (StreamCallback, _callback_class(mode))):
        (other,) = CALLBACKS.keys() - {mode}
        raise ValueError(
            f"{target.key}.{TARGET} must give a sequel_core.StreamCallback or, with mode={mode}, a "
            f"{CALLBACKS[mode]}, got a {found.__name__} from {target.path}; "
            f"a {CALLBACKS[other]} needs mode={other}"
        )


def _callback_class(mode: Mode) -> type:
    module, _, name = CALLBACKS[mode].rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def build_benchmark(config: ExperimentConfig) -> Benchmark:
    """Build the experiment's stream and check the settings that depend on it, before any training.

    Raises:
        ValueError: arguments out of range, missing or damaged data, `num_classes` other than the benchmark's,
            a batch larger than a task, too few entries of `epochs_per_task`, an algorithm's setting that does
            not fit batch or stream, or an evaluation on validation samples that there are not.
    """
    name, arguments = config.benchmark
    if "benchmark" in config.own:
        benchmark = user_benchmark(config.own["benchmark"], config.training)
    else:
        try:
            benchmark = _benchmarks()[name](**arguments)
        except ValueError as error:
            start = str(error).partition(" ")[0]
            known = start in {spec.key for spec in settings("benchmark", name)}
            raise ValueError(f"benchmark.{error}" if known else str(error)) from error
    if config.num_classes not in (None, benchmark.num_classes):
        raise ValueError(
            f"backbone.num_classes must be the benchmark's {benchmark.num_classes}, "
            f"got {config.num_classes!r}; leave it out"
        )
    try:
        config.training.epochs(len(benchmark) - 1)
    except ValueError as error:
        raise ValueError(f"training.{error}") from error
    try:
        config.algo.check(benchmark.spec, config.training)
        stages = list(config.algo.training_tasks(benchmark, config.training.seed))
    except ValueError as error:
        known = str(error).partition(" ")[0] in {spec.name for spec in fields(config.algo)}
        raise ValueError(f"algo.{error}" if known else str(error)) from error
    for task in stages:
        check_batch_size(task.index, len(task.train), config.training.batch_size)
    empty = next((task.index for task in benchmark.tasks if len(task.validation) == 0), None)
    if config.evaluate_on == "validation" and empty is not None:
        raise ValueError(
            f"evaluate_on=validation needs validation samples, got none in task {empty}; "
            "set benchmark.validation, for example to 0.1"
        )
    return benchmark


def user_benchmark(target: Target, training: TrainingHParams) -> Benchmark:
    """Return the stream that a user's own code makes: a Benchmark, or an object with `prepare_datasets()`.

    Raises:
        ValueError: it is neither, or the code refuses an argument.
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
