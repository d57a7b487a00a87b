"""Alternative spellings of settings, and configurations as flat layers in the canonical spelling.

A layer maps dotted keys to values: `{"algo.name": "ewc", "optimizer.lr": 0.01, ...}`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sequel_core.experiment.target import TARGET

Layer = dict[str, Any]

SECTIONS = {"algo": "name", "benchmark": "name", "backbone": "type", "optimizer": "type"}
"""The sections that a name selects, and the key of that name."""

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
"""Other spellings of keys: those of the paper's files, of the original library and of command lines."""

NAMES = {
    "mode": {"lightning": "pytorch", "torch": "pytorch", "flax": "jax"},
    "algo.name": {
        "der++": "derpp",
        "stablesgd": "stable_sgd",
        "stable-sgd": "stable_sgd",
        "a-gem": "agem",
        "er-ace": "er_ace",
        "erace": "er_ace",
        "mc-sgd": "mcsgd",
        "la-maml": "lamaml",
    },
    "benchmark.name": {
        "tinyimagenet": "splittinyimagenet",
        "cifar10": "splitcifar10",
        "cifar100": "splitcifar100",
    },
    "backbone.type": {"resnet18thin": "resnet18_thin"},
    "optimizer.type": {},
    "algo.memory": {"task": "task_quota", "uniform": "task_quota", "class": "class_quota"},
}
"""Settings whose values are names, in any case, and other spellings of these names."""

SHAPE = ("widths", "width", "n_hidden_layers")
"""Settings of the shape of a multi-layer perceptron; `width` and `n_hidden_layers` together give `widths`."""


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Layer:
    """Return nested values as a flat layer. An empty mapping stays a value."""
    flat: Layer = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def nest(flat: Layer) -> dict[str, Any]:
    """Return a flat layer as nested values.

    Raises:
        ValueError: a key is both a value and a group of settings.
    """
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


def alias(key: str, value: Any) -> Any:
    """Return the canonical spelling of the value of `mode`, `algo.name`, ...; any other value unchanged."""
    if key not in NAMES or not isinstance(value, str):
        return value
    return NAMES[key].get(value.lower(), value.lower())


def spelling(section: str, key: str, known: Collection[str]) -> str:
    """Return the spelling of a key that is in `known`, for example `learning_rate` for `lr`."""
    path = f"{section}.{key}"
    others = [SPELLINGS.get(path, ""), *(old for old, new in SPELLINGS.items() if new == path)]
    names = [other.removeprefix(f"{section}.") for other in others if other.startswith(f"{section}.")]
    return next((name for name in (key, *names) if name in known), key)


def canonical(values: Mapping[str, Any]) -> Layer:
    """Return nested or flat values as a flat layer in the canonical spelling.

    Raises:
        ValueError: two spellings of a setting have different values.
    """
    layer = flatten(values)
    _spell_loggers(layer)
    arguments = set()  # keys that are arguments of user code, and not names of something built in
    for section, key in SECTIONS.items():
        target = f"{section}.{TARGET}"
        if target in layer:
            arguments.add(f"{section}.{key}")
        if section in layer:
            value = layer.pop(section)
            if target in layer:
                raise _differ(section, value, target, layer[target])
            if not isinstance(value, str):
                raise ValueError(f"{section} must be a name or settings with `{key}`, got {value!r}")
            _move(layer, section, value, f"{section}.{key}")
    for old, new in SPELLINGS.items():
        if old in layer and new not in arguments:
            _move(layer, old, layer.pop(old), new)
    layer |= {key: alias(key, layer[key]) for key in NAMES if key in layer and key not in arguments}
    widths: Any = layer.get("backbone.widths")
    for key in (f"backbone.{key}" for key in SHAPE[1:] if isinstance(widths, list | tuple)):
        value = layer.pop(key, None)
        if value is not None and ({*widths} != {value} if key.endswith("width") else len(widths) != value):
            raise _differ("backbone.widths", widths, key, value)
    return layer


def loggers_by_name(chosen: Any) -> Layer:
    """Return a choice of loggers, a name or a list of names and user code, as settings by name.

    User code is named by its position in the list.
    """
    named: Layer = {}
    for i, item in enumerate(chosen if isinstance(chosen, list | tuple) else [chosen]):
        if isinstance(item, Mapping) and TARGET in item:
            named[str(i)] = item
        elif isinstance(item, str):
            named[item] = {}
        else:
            raise ValueError(f"logger must be names or settings with `{TARGET}`, got {item!r}")
    return named


def _spell_loggers(layer: Layer) -> None:
    """Rewrite the choice of loggers, and the section `wandb` of the paper, as `logger.<name>.<setting>`."""
    chosen = layer.pop("logger", {})
    named = {} if chosen in (None, {}) else loggers_by_name(chosen)
    if named and f"logger.{TARGET}" in layer:
        raise ValueError(f"logger and logger.{TARGET} are both given: {chosen!r}; give a list with both")
    for path, value in flatten(named, "logger.").items():
        layer.setdefault(path, value)
    if not isinstance(layer.get("wandb"), Mapping | None):
        raise ValueError(f"wandb must be a group of settings, got {layer['wandb']!r}")
    for path in [path for path in layer if path.partition(".")[0] == "wandb"]:
        _move(layer, path, layer.pop(path), f"logger.{path}")
    loggers = [path for path in layer if path.startswith("logger.")]
    for path in loggers:  # an empty mapping selects a logger
        if layer[path] == {} and any(other.startswith(f"{path}.") for other in loggers):
            del layer[path]
    if chosen is None and not loggers:
        layer["logger"] = None


def _move(layer: Layer, old: str, value: Any, new: str) -> None:
    if new in layer and alias(new, layer[new]) != alias(new, value):
        raise _differ(new, layer[new], old, value)
    layer[new] = value


def _differ(key: str, value: Any, other: str, other_value: Any) -> ValueError:
    return ValueError(f"{key} and {other} differ: {value!r} and {other_value!r}; give one of them")
