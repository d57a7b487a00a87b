"""From a command line to a checked experiment: files, shipped experiments, overrides; composed with Hydra."""

from __future__ import annotations

import copy
import os
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as compose_groups
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sequel_core.experiment.config import (
    SECTIONS,
    SPELLINGS,
    ExperimentConfig,
    Layer,
    alias,
    build,
    canonical,
    check_name,
    choices,
    drop_foreign,
    flatten,
    merge,
    nest,
    user_code,
)
from sequel_core.experiment.target import TARGET, Target, nearest
from sequel_core.runs.results import CONFIG, METRICS, SUMMARY, WRITER, other_version, read_yaml, writer

CONFIGS = "sequel_configs"
MOST_RUNS = 1000  # of a sweep, which are all composed before the first one starts
PLACES = ("file", "experiment", "run_dir")
"""Keys that say where settings come from and where results go; they are not part of an experiment."""


class Composed(NamedTuple):
    """An experiment, and what the user should be told about how it came about."""

    config: ExperimentConfig
    notes: list[str]


class Request(NamedTuple):
    """A command line as Hydra takes it."""

    overrides: list[str]  # legal for Hydra's own composition, whatever the experiment
    hydra: list[str]  # Hydra's own settings
    run_dir: str | None


def experiments() -> list[str]:
    """Return the names of the shipped experiments."""
    files = resources.files(CONFIGS).joinpath("experiment").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in files if path.name.endswith(".yaml"))


def compose(overrides: Sequence[str]) -> Composed:
    """Return the experiment that a command line describes.

    The groups that the names select (`algo`, `benchmark`, `backbone`, `optimizer`, `logger`) come first; a
    file's keys win over theirs, the overrides over both. Where an override selects another algorithm, other
    loggers, ... than the file, the file's settings that the new choice lacks are dropped, with a note. Where
    a `_target_` names the user's own code, the current directory becomes importable, as with `python -m`.

    Args:
        overrides: Hydra overrides, and at most one FILE, `file=FILE` or `experiment=NAME`; no sweeps.

    Raises:
        ValueError: something that cannot be read, an unknown name or key, or a value out of range; one line.
    """
    with _hydra() as loader:
        line = _values(_parse(with_paths(overrides), loader))
        file = _file(line)
        line_layer = canonical(line)
        default = _groups()
        file_layer = canonical(file)
        notes = []
        if any(TARGET in f"{path}: {value}" for path, value in (file_layer | line_layer).items()):
            _import_from_here()
        names: dict[str, str] = {}
        choice: str | Target
        for section, key in SECTIONS.items():
            path, target = f"{section}.{key}", f"{section}.{TARGET}"
            before = file_layer.get(target, file_layer.get(path, default[path]))
            chosen = line_layer.get(target, line_layer.get(path, before))
            if target in line_layer or (target in file_layer and path not in line_layer):
                known = _resolve(merge(default, file_layer, line_layer))
                choice = user_code(section, {TARGET: known[target]}, known["mode"])
            else:
                choice = names[section] = line_layer[path] = str(chosen)
                check_name(section, choice, choices(section))
            if chosen != before:
                dropped = drop_foreign(file_layer, section, choice)
                if file and section in ("algo", "benchmark"):
                    dropped += [
                        key for key in list(file_layer) if key.startswith("expected.") and file_layer.pop(key)
                    ]
                if dropped:
                    notes.append(
                        f"{section}={chosen} in place of {before}: dropped the file's {', '.join(dropped)}"
                    )
        chosen_loggers = _choice_of_loggers(line, line_layer, file_layer, notes)
        chosen_groups = [f"{key}={name}" for key, name in names.items()]
        chosen_groups.append(f"logger=[{','.join(chosen_loggers)}]")
        groups = _groups(*chosen_groups)
    for key in list(groups):
        if key.partition(".")[0] in SECTIONS.keys() - names.keys():  # which are the user's own code
            del groups[key]
    for key in PLACES:
        groups.pop(key, None)
    return Composed(build(_resolve(merge(groups, file_layer, line_layer))), notes)


def _groups(*chosen: str) -> Layer:
    """Return the settings of the groups that a choice names, of the default ones for none."""
    return copy.deepcopy(_composed(chosen))


@cache
def _composed(chosen: tuple[str, ...]) -> Layer:
    """Compose the shipped groups, once for each choice: nothing else of a command line takes so long."""
    return canonical(_plain(compose_groups("config", list(chosen))))


def _choice_of_loggers(line: Layer, line_layer: Layer, file_layer: Layer, notes: list[str]) -> list[str]:
    """Return the built-in loggers that are chosen.

    Where the command line names loggers, those of the file that it does not name are dropped, with a note.
    """
    target = f"logger.{TARGET}"  # the user's own logger alone

    def named(layer: Layer) -> list[str]:
        if target in layer:
            return [str(layer[target])]
        found = dict.fromkeys(path.split(".")[1] for path in layer if path.startswith("logger."))
        return [name for name in found if layer.get(f"logger.{name}", "") is not None]

    here, there = named(line_layer), named(file_layer)
    if "logger" in line or (target in line_layer and target not in file_layer):
        for path in [path for path in file_layer if path.startswith("logger.")]:
            if target in file_layer or path.split(".")[1] not in here:
                del file_layer[path]
        if set(there) - set(here):
            notes.append(f"logger={','.join(here) or 'null'} in place of {','.join(there)}")
    both = merge(file_layer, line_layer)
    built_in = set(choices("logger"))
    return [name for name in named(both) if name in built_in and f"logger.{name}.{TARGET}" not in both]


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with paths that Hydra can read: `file='FILE'`, absolute, and `run_dir='DIR'`.

    Raises:
        ValueError: no such file, or more than one.
    """
    files = [text for text in arguments if "=" not in text and not text.startswith(("~", "-"))]
    if len(files) > 1:
        raise ValueError(f"give one FILE, got {' and '.join(files)}; overrides are written key=value")
    written = []
    for text in arguments:
        if text in files:
            if not Path(text).is_file():
                hint = nearest(text, [*experiments(), *(f"{key}=" for key in (*SECTIONS, "mode", "seed"))])
                if text in experiments():
                    hint = f"; did you mean +experiment={text}?"
                raise ValueError(f"{text} is neither a file nor an override such as algo=ewc{hint}")
            written.append(f"file={quoted(str(Path(text).absolute()))}")
        elif text.startswith("run_dir=") and text[8:9] not in ("'", '"') and text != "run_dir=null":
            written.append(f"run_dir={quoted(text[8:])}")
        else:
            written.append(text)
    return written


def quoted(text: str) -> str:
    """Return text as Hydra reads it literally in an override's value."""
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def request(arguments: Sequence[str], sweep: bool) -> Request:
    """Return a command line in the form that Hydra's own composition accepts for any experiment.

    Groups get their one spelling, every other key `++`; what it all means is left to `compose` in the job.

    Args:
        arguments: overrides, and at most one FILE.
        sweep: whether values may be lists to sweep over (`algo=ewc,naive`).

    Raises:
        ValueError: an argument that cannot be read, or a sweep where none is asked for.
    """
    plain, hydra, run_dir = [], [], None
    with _hydra() as loader:
        for override in _parse(with_paths(arguments), loader):
            key = override.key_or_group
            if key == "hydra" or key.startswith(("hydra.", "hydra/")):
                if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"):
                    raise ValueError(f"{key} is set by the command; use run_dir=DIR")
                hydra.append(str(override.input_line))
                continue
            if not sweep:
                _single(override)
            if key == "run_dir":
                value = _single(override).value()
                run_dir = None if value is None else str(value)
                continue
            text = str(override.input_line).partition("=")[2]
            section, _, inner = SPELLINGS.get(key, key).partition(".")
            if section in SECTIONS and inner in ("", SECTIONS[section]) and not text.startswith("{"):
                swept = override.is_sweep_override()
                names = list(override.sweep_string_iterator()) if swept else [str(override.value())]
                names = [alias(f"{section}.{SECTIONS[section]}", name.strip("'\"")) for name in names]
                for name in names:
                    check_name(section, name, choices(section))
                plain.append(f"{section}={','.join(names)}")
            elif key == "experiment":
                plain.append(f"experiment={text}")
            elif key == "logger":
                plain.append(_loggers(override))
            else:
                plain.append(f"++{key}={text}")
    return Request(plain, hydra, run_dir)


def _loggers(override: Override) -> str:
    """Return the choice of loggers as Hydra takes it: names as those of its group, own code as a mapping.

    Raises:
        ValueError: no such logger.
    """
    parser = OverridesParser.create()
    swept = override.is_sweep_override()
    texts = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
    values = [parser.parse_override(f"logger={text}").value() for text in texts]
    lists = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
    for item in chain(*lists):
        if not isinstance(item, dict):
            check_name("logger", item, choices("logger"))
    if not any(isinstance(item, dict) for item in chain(*lists)):
        return f"logger={','.join('[]' if text == 'null' else text for text in texts)}"
    for k, items in enumerate(lists):
        if not isinstance(values[k], dict):
            keyed = ({str(i): item} if isinstance(item, dict) else {item: {}} for i, item in enumerate(items))
            texts[k] = Override._get_value_element_as_str(dict(ChainMap(*keyed)))
    return f"++logger={','.join(texts)}"


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    """Open Hydra on the shipped groups, also inside one of its jobs; its errors become ValueErrors."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIGS, job_name="sequel", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _parse(arguments: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in arguments:
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException as error:
            raise ValueError(f"cannot read the override {text!r}: {one_line(error)}") from error
        if override.is_delete():
            raise ValueError(f"{text} would delete a setting; give it a value instead, for example key=null")
        if override.package is not None:
            raise ValueError(f"{text} names a package; write {override.key_or_group}=... without it")
        swept = override.value()
        if isinstance(swept, RangeSweep) and sum(1 for _ in islice(swept.range(), MOST_RUNS + 1)) > MOST_RUNS:
            raise ValueError(f"{text} has more than {MOST_RUNS} values; a sweep has at most {MOST_RUNS} runs")
        parsed.append(override)
    return parsed


def _single(override: Override) -> Override:
    if override.is_sweep_override():
        raise ValueError(f"{override.input_line} has several values; use `sequel run -m` to sweep over them")
    return override


def _values(parsed: Sequence[Override]) -> Layer:
    """Return the overrides' values as a flat layer; of two for one key the later wins."""
    layer: Layer = {}
    for override in parsed:
        key = override.key_or_group
        if key != "hydra" and not key.startswith(("hydra.", "hydra/")):
            value = _single(override).value()
            chosen = key in SECTIONS and not isinstance(value, Mapping)  # it keeps settings given before it
            layer = layer | {key: value} if chosen else merge(layer, flatten({key: value}))
    return layer


def _file(line: Layer) -> Mapping[str, Any]:
    """Take the places out of the command line's values and return what the file or experiment says."""
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
    """Return a configuration file's values."""
    try:
        values = read_yaml(path, lambda text: OmegaConf.to_container(OmegaConf.load(StringIO(text))))
    except OSError as error:
        raise ValueError(f"file must be a file that can be read, got {path} ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file of settings: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings such as `algo:`, got a list")
    for key in PLACES:
        if key in values:
            raise ValueError(f"{path} cannot set {key}; give it on the command line")
    return {str(key): value for key, value in values.items() if key != WRITER}


def other_version_of(overrides: Sequence[str]) -> str:
    """Return what an error adds if the FILE is that of a run, and another version wrote it; else nothing."""
    for path in map(Path, overrides):
        if path.name == CONFIG and any(path.with_name(name).is_file() for name in (METRICS, SUMMARY)):
            return other_version(writer(path.parent), "the settings were")
    return ""


def _import_from_here() -> None:
    """Let modules of the current directory be imported, before those that are installed."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def _plain(config: Any) -> Mapping[str, Any]:
    values = OmegaConf.to_container(config)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _resolve(flat: Layer) -> Layer:
    """Return the layer with interpolations such as `${optimizer.lr}` replaced by what they point at."""
    if not any("${" in str(value) for value in flat.values()):
        return flat
    spelt = flat | {old: flat[new] for old, new in SPELLINGS.items() if new in flat and old not in flat}
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(nest(spelt)), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    values = flatten(resolved) if isinstance(resolved, dict) else {}
    return {key: values[key] for key in flat if key in values}
