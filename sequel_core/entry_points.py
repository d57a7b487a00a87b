"""Methods of installed packages, under a short name: `algo=magnitude`.

A package declares a method as entry points: its settings, a subclass of `AlgorithmHParams`, and its
implementation in one framework or in both.

    [project.entry-points."sequel.algorithms"]
    magnitude = "sequel_magnitude.settings:MagnitudeHParams"
    [project.entry-points."sequel.algorithms.pytorch"]     # a subclass of ContinualModule
    magnitude = "sequel_magnitude.lightning:Magnitude"
    [project.entry-points."sequel.algorithms.jax"]         # a function (hparams, seed) -> Algorithm
    magnitude = "sequel_magnitude.flax:magnitude"

The names are read when a command or a configuration asks for them. The settings are imported when their name
is chosen or listed, and an implementation is imported when a learner is made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from sequel_core.algorithms import ALGORITHMS
from sequel_core.experiment.aliases import NAMES
from sequel_core.hparams import AlgorithmHParams
from sequel_core.runs.learner import PLUGINS, Mode

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "sequel.algorithms"
"""The group of the settings; the implementations are in this group with `.pytorch` or `.jax` after it."""


@cache  # because all installed packages are searched; anew if the path has changed
def _entry_points(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import

    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in points and point.value != points[point.name].value:
            raise ValueError(
                f"{group} must have one method {point.name}, got {_package(points[point.name])} and "
                f"{_package(point)}; uninstall one of the packages"
            )
        points[point.name] = point
    return points


def installed() -> Mapping[str, EntryPoint]:
    """Return the entry points of the settings of all methods that are not built in, by name; none is loaded.

    Raises:
        ValueError: a name is that of a built-in method or not in lower case, or two packages have it.
    """
    points = _entry_points(GROUP, tuple(sys.path))
    for name, point in points.items():
        if name in ALGORITHMS or name in NAMES["algo.name"]:
            raise ValueError(
                f"the method {name} of the package {_package(point)} has the name of a built-in method; "
                f"rename its entry points in {GROUP}, or uninstall the package"
            )
        if not name.isidentifier() or name != name.lower():
            raise ValueError(
                f"the name of a method must be an identifier in lower case, got {name!r} of the package "
                f"{_package(point)}; rename its entry points in {GROUP}"
            )
    return points


def modes_of(name: str) -> list[Mode]:
    """Return the modes that a method of an installed package has an implementation for."""
    return [mode for mode in PLUGINS if name in _implementations(mode)]


def about(name: str) -> str:
    """Return the package and the modes of a method that is not built in, for `sequel list`."""
    return f"package {_package(installed()[name])}; mode={' or '.join(modes_of(name)) or 'none'}"


def check_mode(name: str, mode: Mode) -> None:
    """Raise ValueError if a method of an installed package has no implementation for a mode."""
    if name in installed() and mode not in modes_of(name):
        modes = " or ".join(modes_of(name))
        raise ValueError(
            f"algo={name} has no implementation for mode={mode}: the package {_package(installed()[name])} "
            f"has no entry point in {GROUP}.{mode}; " + (f"set mode={modes}" if modes else "add one")
        )


def hparams_class(name: str) -> type[AlgorithmHParams]:
    """Return the class of the settings of a method, built in or not.

    Raises:
        ValueError: its import fails, or it is no subclass of AlgorithmHParams with this name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    point = installed()[name]
    cls = _loaded(point)
    if not (inspect.isclass(cls) and issubclass(cls, AlgorithmHParams) and cls.name == name):
        raise ValueError(
            f"the entry point {name} in {GROUP} must be a subclass of AlgorithmHParams whose name is "
            f"{name!r}, got {point.value} of the package {_package(point)}"
        )
    return cls


def implementation(hparams: AlgorithmHParams, mode: Mode) -> Any:
    """Return the implementation of the method that settings belong to; it is not built in.

    Raises:
        ValueError: no installed package has these settings and an implementation for the mode.
    """
    name = hparams.name
    if name not in installed() or not isinstance(hparams, hparams_class(name)):
        raise ValueError(f"implementation is needed for {name}, which is not built in; pass it")
    check_mode(name, mode)
    return _loaded(_implementations(mode)[name])


def _implementations(mode: Mode) -> Mapping[str, EntryPoint]:
    return _entry_points(f"{GROUP}.{mode}", tuple(sys.path))


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever the module raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the method {point.name} of the package {_package(point)} cannot be loaded: importing "
            f"{point.value} failed with {text}"
        ) from error
