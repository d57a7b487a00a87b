"""From a command line to a checked experiment: groups, files and overrides, merged by OmegaConf."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as compose_groups
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sequel_core.experiment.aliases import (
    SECTIONS,
    SHAPE,
    SPELLINGS,
    Layer,
    canonical,
    flatten,
    nest,
)
from sequel_core.experiment.build import build, drop_foreign, user_code
from sequel_core.experiment.overrides import (
    CONFIGS,
    experiments,
    for_hydra,
    hydra_context,
    one_line,
    parse,
    single,
    with_paths,
)
from sequel_core.experiment.schema import ExperimentConfig, choices
from sequel_core.experiment.target import TARGET, Target
from sequel_core.runs.directory import CONFIG, METRICS, SUMMARY, writer
from sequel_core.runs.files import read_yaml
from sequel_core.runs.results import SCORE
from sequel_core.runs.versions import WRITER, version_note
from sequel_core.settings import check_name

PLACES = ("file", "experiment", "run_dir")
"""Keys that say where settings come from and where results go. They are not part of an experiment."""


class Composed(NamedTuple):
    """An experiment, and notes for the user about settings that were dropped."""

    config: ExperimentConfig
    notes: list[str]


def compose(overrides: Sequence[str]) -> Composed:
    """Return the experiment that a command line describes.

    The config groups that the names select (`algo`, `benchmark`, `backbone`, `optimizer`, `logger`) have the
    lowest precedence, then the file, then the overrides. If an override selects another algorithm, other
    loggers, ... than the file, the settings of the file that the new choice lacks are dropped, with a note.
    If a `_target_` names user code, modules of the current directory become importable, as with `python -m`.

    Args:
        overrides: Hydra overrides, and at most one FILE, `file=FILE` or `experiment=NAME`; no sweeps.

    Raises:
        ValueError: something cannot be read, a name or key is unknown, or a value is out of range. The
            message has one line.

    Example:
        >>> config, notes = compose(["experiment=ewc_rotatedmnist", "algo=naive", "seed=1"])
        >>> config.algo.name, config.training.seed
        ('naive', 1)
    """
    notes: list[str] = []
    names: dict[str, str] = {}
    with hydra_context() as loader:
        line, selected = _command_line(parse(with_paths(overrides), loader))
        file, named_loggers = canonical(_file(line)), "logger" in line or "logger" in selected
        line, defaults = canonical(line | selected), _groups()
        has_user_code = any(TARGET in f"{path}: {value}" for path, value in (file | line).items())
        if has_user_code and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        for section, key in SECTIONS.items():
            path, target = f"{section}.{key}", f"{section}.{TARGET}"
            before = file.get(target, file.get(path, defaults[path]))
            chosen = line.get(target, line.get(path, before))
            choice: str | Target
            if target in line or (target in file and path not in line):
                known = resolved(merge(defaults, file, line))
                choice = user_code(section, {TARGET: known[target]}, known["mode"])
            else:
                choice = names[section] = line[path] = str(chosen)
                check_name(section, choice, choices(section))
            if chosen != before:
                dropped = drop_foreign(file, section, choice)
                if section in ("algo", "benchmark"):
                    dropped += [key for key in list(file) if key.startswith("expected.") and file.pop(key)]
                if dropped:
                    text = f"dropped the file's {', '.join(dropped)}"
                    notes.append(f"{section}={chosen} in place of {before}: {text}")
        notes += _drop_loggers(line, file, named_loggers)
        groups = _groups(*(f"{section}={name}" for section, name in names.items()))
        unused = (*PLACES, *(SECTIONS.keys() - names.keys()))  # sections that are user code have no group
        groups = {path: value for path, value in groups.items() if path.partition(".")[0] not in unused}
        return Composed(build(resolved(merge(groups, file, line))), notes)


def _command_line(overrides: Sequence[Override]) -> tuple[Layer, Layer]:
    """Return the settings of a command line, and its selections such as `algo=ewc` or `logger=[csv]`."""
    given: list[Layer] = []
    selected: Layer = {}
    for override in overrides:
        if for_hydra(override):
            continue
        key, value = override.key_or_group, single(override).value()
        if key == "logger" and not value:
            selected.pop(key, None)
        elif not isinstance(value, Mapping) and key in (*SECTIONS, "logger"):
            selected[key] = value
            continue
        given.append(flatten({key: value}))
    return merge(*given), selected


def merge(*layers: Layer) -> Layer:
    """Merge flat layers with OmegaConf; later layers win.

    `widths`, or `width` and `n_hidden_layers` together, replace all three settings of earlier layers.
    """
    merged: Any = OmegaConf.create({})
    for layer in layers:
        values = OmegaConf.create(nest(layer))
        if "backbone.widths" in layer or {"backbone.width", "backbone.n_hidden_layers"} <= layer.keys():
            for key in SHAPE:
                merged.get("backbone", {}).pop(key, None)
        try:
            merged = OmegaConf.unsafe_merge(merged, values)
        except TypeError as error:  # a mapping and a list
            raise ValueError(f"a group of settings and a list cannot be merged: {one_line(error)}") from error
    container: Any = OmegaConf.to_container(merged)
    return flatten(container)


def resolved(flat: Layer) -> Layer:
    """Return a layer with interpolations such as `${optimizer.lr}` replaced by the values they refer to."""
    if not any("${" in str(value) for value in flat.values()):
        return flat
    spelt = flat | {old: flat[new] for old, new in SPELLINGS.items() if new in flat and old not in flat}
    try:
        values = flatten(OmegaConf.to_container(OmegaConf.create(nest(spelt)), resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    return {key: values[key] for key in flat if key in values}


@cache  # because this takes most of the time
def _groups(*chosen: str) -> Layer:
    """Return the settings in the config groups that are chosen; the default ones for none."""
    return canonical(OmegaConf.to_container(compose_groups("config", list(chosen))))  # type: ignore[arg-type]


def _drop_loggers(line: Layer, file: Layer, named: bool) -> list[str]:
    """If the command line names loggers, remove the others of the file; return a note about them."""
    target = f"logger.{TARGET}"  # user code, as the only logger

    def selected(layer: Layer) -> list[str]:
        if target in layer:
            return [str(layer[target])]
        names = dict.fromkeys(path.split(".")[1] for path in layer if path.startswith("logger."))
        return [name for name in names if layer.get(f"logger.{name}", "") is not None]

    in_line, in_file = selected(line), selected(file)
    if not named and (target not in line or target in file):
        return []
    for path in [path for path in file if path.startswith("logger.")]:
        if target in file or path.split(".")[1] not in in_line:
            del file[path]
    if set(in_file) <= set(in_line):
        return []
    return [f"logger={','.join(in_line) or 'null'} in place of {','.join(in_file)}"]


def _file(line: Layer) -> Mapping[str, Any]:
    """Remove `PLACES` from the values of the command line; return the values of the file or experiment."""
    file, experiment, _ = (line.pop(key, None) for key in PLACES)
    if file is not None and experiment is not None:
        raise ValueError(f"give a FILE or experiment=NAME, got both: {file} and {experiment}")
    if file is not None:
        return _read(Path(str(file)))
    if experiment is None:
        return {}
    check_name("experiment", experiment, experiments())
    with resources.as_file(resources.files(CONFIGS).joinpath("experiment", f"{experiment}.yaml")) as path:
        return _read(path)


def _read(path: Path) -> Mapping[str, Any]:
    """Return the values of an experiment file."""
    try:
        values = read_yaml(path, lambda text: OmegaConf.to_container(OmegaConf.load(StringIO(text))))
    except OSError as error:
        raise ValueError(f"file must be a readable file, got {path} ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file of settings: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings such as `algo:`, got a list")
    for key in PLACES:
        if key in values:
            raise ValueError(f"{path} cannot set {key}; give it on the command line")
    return {str(key): value for key, value in values.items() if key not in (SCORE, WRITER)}


def other_version_of(overrides: Sequence[str]) -> str:
    """Return a note for an error if the FILE belongs to a run of another version, else an empty text."""
    for path in map(Path, overrides):
        if path.name == CONFIG and any(path.with_name(name).is_file() for name in (METRICS, SUMMARY)):
            return version_note(writer(path.parent), "the settings were")
    return ""
