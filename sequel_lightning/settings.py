"""Settings and stream specs as plain values, for checkpoints and hparams.yaml, and back.

Plain values are numbers, texts, lists and dictionaries: `torch.load(weights_only=True)` reads them, and YAML
is readable. A constructor takes them in place of `hparams` and `spec`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.trees import LeafSpec, Tree, tree_map


def plain_hparams(hparams: AlgorithmHParams) -> dict[str, Any]:
    """Return the name of the algorithm and its settings."""
    values = {field.name: getattr(hparams, field.name) for field in fields(hparams)}
    return {"name": hparams.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def check_hparams(cls: Any, hparams: AlgorithmHParams | None, spec: StreamSpec | None) -> AlgorithmHParams:
    """Return the settings of a class of algorithms, by default those of its `hparams_class`.

    Raises:
        ValueError: settings of another algorithm, or that do not fit the stream.
    """
    hparams_class: type[AlgorithmHParams] = cls.hparams_class
    settings = hparams_class() if hparams is None else hparams
    if not isinstance(settings, hparams_class):
        raise ValueError(f"{cls.__name__} needs {hparams_class.__name__}, got {type(settings).__name__}")
    if spec is not None:
        settings.check_stream(spec)
    return settings


def plain_spec(spec: StreamSpec) -> dict[str, Any]:
    """Return the spec as plain values; the mask becomes the classes of each task."""
    normalisation, augmentation = spec.normalisation, spec.augmentation
    return {
        "x": tree_map(_plain_leaf, spec.x),
        "y": tree_map(_plain_leaf, spec.y),
        "num_classes": int(spec.num_classes),
        "num_tasks": int(spec.num_tasks),
        "scenario": str(spec.scenario),
        "classes": [np.flatnonzero(row).tolist() for row in spec.mask],
        "normalisation": {k: [float(v) for v in vars(normalisation)[k]] for k in ("mean", "std")},
        "augmentation": {"padding": int(augmentation.padding), "flip": bool(augmentation.flip)},
    }


def hparams_from(plain: Mapping[str, Any], hparams_class: type[AlgorithmHParams]) -> AlgorithmHParams:
    """Return the settings for the plain values of `plain_hparams`; missing settings have their defaults.

    Raises:
        ValueError: settings of another algorithm, an unknown setting, or a value out of its range.
    """
    values = dict(plain)
    name = values.pop("name", hparams_class.name)
    if name != hparams_class.name:
        raise ValueError(
            f"hparams are settings of {name}, and {hparams_class.name} is what they are given to"
        )
    known = [field.name for field in fields(hparams_class)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{hparams_class.name} has no setting {', '.join(unknown)}; its settings are {', '.join(known)}"
        )
    return hparams_class(**values)


def spec_from(plain: Mapping[str, Any]) -> StreamSpec:
    """Return the spec for the plain values of `plain_spec`.

    Raises:
        ValueError: a field is missing or unknown, or a class is not below `num_classes`.
    """
    values = dict(plain)
    classes = values.pop("classes", [])
    if "image_shape" in values:  # of a checkpoint that an earlier version wrote
        values["x"] = {"shape": values.pop("image_shape"), "dtype": values.pop("image_dtype", "uint8")}
    needed = {"x", "num_classes", "num_tasks", "scenario"}
    wrong = (needed - values.keys()) | (values.keys() - set(StreamSpec._fields))
    if wrong:
        raise ValueError(
            f"spec must have {', '.join(sorted(needed))} and classes, and may have the other fields of "
            f"StreamSpec; missing or unknown: {', '.join(sorted(wrong))}"
        )
    num_tasks, num_classes = values["num_tasks"], values["num_classes"]
    if len(classes) != num_tasks or not all(0 <= c < num_classes for row in classes for c in row):
        raise ValueError(
            f"spec.classes must list, for each of the {num_tasks} tasks, classes from 0 to "
            f"{num_classes - 1}, got {classes}"
        )
    mask = np.zeros((num_tasks, num_classes), np.bool_)
    for task, row in enumerate(classes):
        mask[task, row] = True
    normalisation = {k: tuple(v) for k, v in values.get("normalisation", {}).items()}
    return StreamSpec(
        **{
            **values,
            "x": _leaves_from(values["x"]),
            "y": _leaves_from(values.get("y", {"shape": [], "dtype": "int64"})),
            "mask": mask,
            "normalisation": Normalisation(**normalisation),
            "augmentation": Augmentation(**values.get("augmentation", {})),
        }
    )


def _plain_leaf(leaf: LeafSpec) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": leaf.dtype}


def _leaves_from(plain: Mapping[str, Any]) -> Tree:
    """Return the leaves for the plain values of `plain_spec`."""
    if plain.keys() == {"shape", "dtype"} and isinstance(plain["dtype"], str):
        return LeafSpec(tuple(plain["shape"]), plain["dtype"])
    return {k: _leaves_from(v) for k, v in plain.items()}


def accept_plain_values(cls: Any) -> None:
    """Let the constructor of a class of algorithms take plain values, and describe its arguments exactly.

    `load_from_checkpoint` passes plain values. LightningCLI and `help()` read the signature: the type of
    `hparams` is the class's own settings, and its default are their defaults.
    """
    construct = cls.__init__
    signature = inspect.signature(construct)
    if "hparams" not in signature.parameters or not hasattr(cls, "hparams_class"):
        return

    @functools.wraps(construct)
    def init(*args: Any, **options: Any) -> None:
        bound = signature.bind(*args, **options)
        hparams, spec = bound.arguments.get("hparams"), bound.arguments.get("spec")
        if isinstance(hparams, Mapping):
            bound.arguments["hparams"] = hparams_from(hparams, cls.hparams_class)
        if isinstance(spec, Mapping):
            bound.arguments["spec"] = spec_from(spec)
        construct(*bound.args, **bound.kwargs)

    types: dict[str, Any] = {"hparams": cls.hparams_class, "spec": StreamSpec | dict[str, Any] | None}
    init.__annotations__ = {k: types.get(k, t) for k, t in construct.__annotations__.items()}
    parameters = {
        name: parameter.replace(annotation=types.get(name, parameter.annotation))
        for name, parameter in signature.parameters.items()
    }
    if signature.parameters["hparams"].default is not inspect.Parameter.empty:
        parameters["hparams"] = parameters["hparams"].replace(default=default_hparams(cls.hparams_class))
    init.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    cls.__init__ = init


def default_hparams(hparams_class: type[AlgorithmHParams]) -> Any:
    """Return the default settings of an algorithm; `Parameter.empty` if a setting has no default."""
    settings = fields(hparams_class)
    complete = all(f.default is not MISSING or f.default_factory is not MISSING for f in settings)
    return hparams_class() if complete else inspect.Parameter.empty
