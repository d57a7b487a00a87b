"""The schema of an experiment: its sections, their settings, and `ExperimentConfig`, which holds them all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from inspect import Parameter
from typing import Any, NamedTuple, cast, get_type_hints

import yaml

from sequel_core import entry_points
from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.backbones import BACKBONES, BackboneHParams, MLPHParams
from sequel_core.experiment.aliases import SECTIONS
from sequel_core.experiment.target import TARGET, Target, hints_of
from sequel_core.hparams import (
    AlgorithmHParams,
    CheckpointHParams,
    JaxHParams,
    OptimizerHParams,
    TrainerHParams,
    TrainingHParams,
)
from sequel_core.objectives import ObjectiveHParams
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.files import plain
from sequel_core.runs.learner import PLUGINS, EvaluateEvery, EvaluateOn, Mode
from sequel_core.runs.services import PACKAGES, check_service, masked
from sequel_core.settings import Settings, allowed, choices_of, setting

CLASSES: dict[str, type[Settings]] = {
    "objective": ObjectiveHParams,
    "optimizer": OptimizerHParams,
    "training": TrainingHParams,
    "checkpoint": CheckpointHParams,
    "trainer": TrainerHParams,
    "jax": JaxHParams,
}
"""The settings of the sections that have one class, whatever is selected by `type`."""

EVALUATION = ("evaluate_every", "evaluate_on", "evaluate_future")
DOCUMENTATION = ("expected", "version", "source", "comment")
CALLBACKS: dict[Mode, str] = {"pytorch": "pytorch_lightning.Callback", "jax": "sequel_flax.hooks.Hook"}
"""The callbacks of the training loop of each mode; both modes also take a StreamCallback."""


class BenchmarkConfig(NamedTuple):
    """A benchmark by name, with the arguments that were given."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Expected(Settings):
    """Published results of an experiment, in percent; other metrics may stand beside them."""

    avg_acc: float = setting(0.0, "published average accuracy, in percent", ge=0, le=100)
    std: float = setting(0.0, "published standard deviation of avg_acc", ge=0)
    runs: int = setting(0, "number of published runs", ge=0)
    tolerance: float = setting(0.0, "how far below avg_acc `sequel reproduce` accepts", ge=0)


SPREAD = ("std", "runs", "tolerance")


@dataclass(frozen=True)
class ExperimentConfig(Settings):
    """One experiment, with every setting checked.

    Args:
        algo: settings of the algorithm.
        benchmark: the stream. Its seed, `benchmark.arguments["seed"]`, is separate from the training seed.
        backbone: settings of the network.
        objective: settings of the loss and the score.
        optimizer: settings of the optimizer.
        training: batch sizes, epochs, seed, ...
        checkpoint: when checkpoints are written, and how many are kept.
        trainer: settings of Lightning's Trainer, see `TrainerHParams`; only with mode=pytorch.
        jax: settings of JAX's devices, only with mode=jax.
        logger: settings of each logger by its name, one of `choices("logger")`; or user code, which makes
            a logger of Lightning or, with mode=jax, a metric writer.
        callbacks: user code that makes a StreamCallback, a Lightning callback (mode=pytorch) or a hook
            (mode=jax).
        user_code: user code by section. It replaces the settings of a backbone, an objective or an optimizer;
            the settings of a user's algorithm have the class that the algorithm names.
        num_classes: number of outputs of the backbone, if a file gives it; must equal the benchmark's.
        expected: published results, which are recorded and printed beside the measured ones; see `Expected`.
        version: version of the library that a file was written for; recorded only.
        source: source of the expected results; recorded only.
        comment: recorded only.

    Raises:
        ValueError: a value is out of range, or a setting cannot be used with the mode.

    Example:
        >>> from sequel_core.experiment.compose import compose
        >>> config = compose(["algo=ewc", "algo.ewc_lambda=10", "mode=jax"]).config
        >>> config.mode, config.algo.ewc_lambda
        ('jax', 10.0)
    """

    mode: Mode = setting("pytorch", "framework: `pytorch` or `jax`")
    algo: AlgorithmHParams = field(default_factory=NaiveHParams)
    benchmark: BenchmarkConfig = field(default_factory=lambda: BenchmarkConfig("rotateddigits", {}))
    backbone: BackboneHParams = field(default_factory=MLPHParams)
    objective: ObjectiveHParams = field(default_factory=ObjectiveHParams)
    optimizer: OptimizerHParams = field(default_factory=OptimizerHParams)
    training: TrainingHParams = field(default_factory=TrainingHParams)
    checkpoint: CheckpointHParams = field(default_factory=CheckpointHParams)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    jax: JaxHParams = field(default_factory=JaxHParams)
    logger: Mapping[str, Target | Mapping[str, Any]] = field(default_factory=dict)
    callbacks: tuple[Target, ...] = ()
    user_code: Mapping[str, Target] = field(default_factory=dict)
    evaluate_every: EvaluateEvery = setting(
        "task",
        "when to evaluate: `task`, after each task; `end`, after the last one only; `epoch` or a number of "
        "steps, also during training",
        ge=1,
    )
    evaluate_on: EvaluateOn = setting("test", "split to evaluate on: `test` or `validation`")
    evaluate_future: bool = setting(False, "evaluate also tasks not seen yet, for forward transfer")
    num_classes: Any = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    version: Any = None
    source: Any = None
    comment: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {spec.name: spec.default for spec in fields(TrainerHParams)}
        changed = [key for key, value in self.trainer.items() if value != defaults.get(key)]
        if self.mode == "jax" and changed:
            raise ValueError(
                f"trainer.{changed[0]} is a setting of Lightning's Trainer, got {self.trainer[changed[0]]!r} "
                "with mode=jax; leave it out or set mode=pytorch"
            )
        if self.mode != "jax" and self.jax != JaxHParams():
            key = "devices" if self.jax.devices > 1 else "runs"
            raise ValueError(
                f"jax.{key} is a setting of JAX, got {getattr(self.jax, key)} with mode={self.mode}; leave "
                "it out or set mode=jax"
            )
        if self.mode not in self.backbone.modes:
            raise ValueError(
                f"backbone={self.backbone.type} needs mode={' or '.join(self.backbone.modes)}, got "
                f"mode={self.mode}; choose another backbone, for example resnet18"
            )
        if "algo" not in self.user_code:
            entry_points.check_mode(self.algo.name, self.mode)
        for target in self.callbacks:
            if inspect.isclass(target.function) and not target.partial:
                check_callback(target, target.function, self.mode)
        for name in PACKAGES:
            service = self.logger.get(name)
            if service is not None and not isinstance(service, Target):
                check_service(name, service)

    def plain(self) -> dict[str, Any]:
        """Return all settings, with defaults, as plain values under the names that a file gives them.

        Values that may be secrets are masked, see `sequel_core.runs.services.masked`.
        """
        algo = self.user_code.get("algo")
        values: dict[str, Any] = {"mode": self.mode}
        values["algo"] = {**({TARGET: algo.path} if algo else {"name": self.algo.name}), **asdict(self.algo)}
        for section in ("benchmark", "backbone", "objective", "optimizer"):
            chosen = getattr(self, section)
            if section in self.user_code:
                values[section] = self.user_code[section].plain()
            elif section == "objective":
                values[section] = asdict(chosen)
            else:
                key, given = SECTIONS[section], chosen.arguments if section == "benchmark" else vars(chosen)
                name = getattr(chosen, key)
                defaults = {spec.key: spec.default for spec in settings(section, name)}
                values[section] = {key: name, **{k: given.get(k, value) for k, value in defaults.items()}}
        values |= {
            "training": asdict(self.training),
            "checkpoint": asdict(self.checkpoint),
            "trainer": dict(self.trainer),
            **({"jax": asdict(self.jax)} if self.mode == "jax" else {}),
            "logger": {k: v.plain() if isinstance(v, Target) else dict(v) for k, v in self.logger.items()},
            **({"callbacks": [target.plain() for target in self.callbacks]} if self.callbacks else {}),
            **{key: getattr(self, key) for key in EVALUATION},
            **{key: getattr(self, key) for key in DOCUMENTATION if getattr(self, key)},
        }
        return cast(dict[str, Any], masked(plain("config", values, as_text=True)))


def check_callback(target: Target, cls: type, mode: Mode) -> None:
    """Raise ValueError if a class is neither a StreamCallback nor a callback of the mode."""
    if not issubclass(cls, (StreamCallback, callback_class(mode))):
        (other,) = CALLBACKS.keys() - {mode}
        raise ValueError(
            f"{target.key}.{TARGET} must give a sequel_core.StreamCallback or, with mode={mode}, a "
            f"{CALLBACKS[mode]}, got a {cls.__name__} from {target.path}; "
            f"a {CALLBACKS[other]} needs mode={other}"
        )


def callback_class(mode: Mode) -> type:
    """Return the class of the callbacks of a mode's training loop."""
    import_module(PLUGINS[mode])  # first, because it must set up torchvision before any other import of it
    module, _, name = CALLBACKS[mode].rpartition(".")
    cls: type = getattr(import_module(module), name)
    return cls


class Setting(NamedTuple):
    """One setting, as `sequel list` shows it."""

    key: str
    default: Any
    allowed: str  # the range of a number, for example ">= 0", or the names to choose from; may be empty
    help: str


def benchmarks() -> Mapping[str, Any]:
    """Return the classes of the built-in benchmarks by name."""
    table: Mapping[str, Any] = import_module("sequel_benchmarks").BENCHMARKS
    return table


def choices(section: str) -> list[str]:
    """Return the names that `algo`, `benchmark`, `backbone`, `optimizer` or `logger` can have.

    Example:
        >>> choices("optimizer")
        ['sgd', 'adam', 'adamw']
    """
    if section == "logger":
        return sorted(path.name.removesuffix(".yaml") for path in logger_files().iterdir())
    if section in CLASSES:
        return list(map(str, choices_of(get_type_hints(CLASSES[section])["type"])))
    if section == "algo":
        return [*ALGORITHMS, *sorted(entry_points.installed())]
    return list(BACKBONES if section == "backbone" else benchmarks())


def settings(section: str, name: str | Target = "") -> list[Setting]:
    """Return the settings of a section.

    Args:
        section: `algo`, `benchmark`, `backbone`, `objective`, `optimizer`, `logger`, `training`,
            `checkpoint`, `trainer` or `jax`.
        name: one of `choices(section)`, or user code; not used for the sections without choices.

    Example:
        >>> [setting.key for setting in settings("algo", "si")][-4:]
        ['si_lambda', 'xi', 'clamp', 'path_gradient']
    """
    if section == "logger" and isinstance(name, str):
        text = logger_files().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        remarks = {line.partition(":")[0].strip(): line.partition(" # ")[2] for line in text.splitlines()}
        return [Setting(k, v, "", remarks.get(k, "")) for k, v in yaml.safe_load(text)[name].items()]
    if isinstance(name, Target) and section != "algo":
        defaults = {key: parameter.default for key, parameter in name.named.items()}
        return [Setting(k, None if v is Parameter.empty else v, "", "") for k, v in defaults.items()]
    cls = settings_class(section, name)
    hints = get_type_hints(cls)
    specs: Iterable[Field[Any]] = fields(cls)
    if section in CLASSES and section in SECTIONS:
        specs = [spec for spec in specs if spec.name != "type" and name in spec.metadata.get("only", (name,))]
    ranges = {spec.name: allowed(spec) or ", ".join(map(str, choices_of(hints[spec.name]))) for spec in specs}
    return [Setting(s.name, s.default, ranges[s.name], s.metadata.get("help", "")) for s in specs]


def settings_class(section: str, name: str | Target = "") -> type[Settings]:
    """Return the class of the settings of a section, or of its choice `name`; see `settings`."""
    if isinstance(name, Target):
        return user_hparams(name)
    if section == "benchmark":
        return cast(type[Settings], benchmarks()[name].settings_class)
    if section == "algo":
        return entry_points.hparams_class(name)
    return BACKBONES[name] if section == "backbone" else CLASSES[section]


def summary(section: str, name: str = "") -> str:
    """Return the first line of the documentation of a section, or of its choice `name`."""
    if section == "logger":
        return logger_files().joinpath(f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0][2:]
    documented = benchmarks()[name] if section == "benchmark" else settings_class(section, name)
    text = (inspect.getdoc(documented) or "").partition("\n")[0]
    if section == "algo" and name not in ALGORITHMS:
        return f"{text} ({entry_points.about(name)})"
    return text


def user_hparams(target: Target) -> type[AlgorithmHParams]:
    """Return the class of the settings of a user's algorithm.

    It is `hparams_class` of a ContinualModule, or the annotation of the first parameter of a function
    `(hparams, seed) -> Algorithm`.

    Raises:
        ValueError: there is no such class, or it is not a subclass of AlgorithmHParams.
    """
    cls = getattr(target.function, "hparams_class", None)
    if cls is None:
        cls = hints_of(target.function).get(next(iter(target.parameters), ""))
    if not (inspect.isclass(cls) and issubclass(cls, AlgorithmHParams) and hasattr(cls, "name")):
        raise ValueError(
            f"{target.key}.{TARGET} must be a ContinualModule whose hparams_class, or a function (hparams, "
            "seed) -> Algorithm whose first annotation, is a subclass of AlgorithmHParams with a name, got "
            f"{target.path} with {getattr(cls, '__name__', cls)}"
        )
    return cls


def logger_files() -> Traversable:
    """Return the folder of the config group that has the settings of each logger."""
    return resources.files("sequel_configs").joinpath("logger")
