"""Command lines as Hydra overrides: parsing, paths, sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sequel_core import entry_points
from sequel_core._compat import override_value_text
from sequel_core.experiment.aliases import SECTIONS, SPELLINGS, alias, loggers_by_name
from sequel_core.experiment.schema import choices
from sequel_core.settings import check_name, nearest

CONFIGS = "sequel_configs"
MAX_RUNS = 1000  # of a sweep; all of them are composed before the first one starts


class Request(NamedTuple):
    """A command line in the form that Hydra accepts."""

    overrides: list[str]  # valid in Hydra's composition for every experiment
    hydra: list[str]  # settings of Hydra itself
    run_dir: str | None


def experiments() -> list[str]:
    """Return the names of the shipped experiments."""
    files = resources.files(CONFIGS).joinpath("experiment").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in files if path.name.endswith(".yaml"))


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with paths quoted for Hydra: `file='FILE'`, absolute, and `run_dir='DIR'`.

    Raises:
        ValueError: a file does not exist, or there are several files.
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
    """Return text quoted so that Hydra takes it literally as the value of an override."""
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def request(arguments: Sequence[str], sweep: bool) -> Request:
    """Return a command line in a form that Hydra's composition accepts for every experiment.

    Names of groups get their canonical spelling, and all other keys get `++`. `compose` interprets them in
    the job.

    Args:
        arguments: overrides, and at most one FILE.
        sweep: whether values may be lists to sweep over (`algo=ewc,naive`).

    Raises:
        ValueError: an argument cannot be parsed, or is a sweep although `sweep` is false.
    """
    overrides, hydra, run_dir = [], [], None
    with hydra_context() as loader:
        for override in parse(with_paths(arguments), loader):
            key, text = override.key_or_group, str(override.input_line).partition("=")[2]
            if for_hydra(override):
                if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"):
                    raise ValueError(f"{key} is set by the command; use run_dir=DIR")
                hydra.append(str(override.input_line))
                continue
            if not sweep:
                single(override)
            section, _, inner = SPELLINGS.get(key, key).partition(".")
            if key == "run_dir":
                value = single(override).value()
                run_dir = None if value is None else str(value)
            elif section in SECTIONS and inner in ("", SECTIONS[section]) and not text.startswith("{"):
                names = [name.strip("'\"") for name in value_texts(override)]
                names = [alias(f"{section}.{SECTIONS[section]}", name) for name in names]
                for name in names:
                    check_name(section, name, choices(section))
                overrides.append(f"{section}={','.join(names)}")
            elif key == "logger":
                overrides.append(_loggers(override))
            else:
                overrides.append(f"{'' if key == 'experiment' else '++'}{key}={text}")
    return Request(overrides, hydra, run_dir)


def _loggers(override: Override) -> str:
    """Return the choice of loggers for Hydra: names as choices of its group, user code as a mapping."""
    parser, texts = OverridesParser.create(), value_texts(override)
    values = [parser.parse_override(f"logger={text}").value() for text in texts]
    values = [[] if value is None else value for value in values]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    for item in items:
        if not isinstance(item, dict):
            check_name("logger", item, choices("logger"))
    if not any(isinstance(item, dict) for item in items):
        return f"logger={','.join('[]' if text == 'null' else text for text in texts)}"
    for k, value in enumerate(values):
        if not isinstance(value, dict):
            texts[k] = override_value_text(loggers_by_name(value))
    return f"++logger={','.join(texts)}"


def value_texts(override: Override) -> list[str]:
    """Return the value of an override, or each value of a sweep, as it is written."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


@contextmanager
def hydra_context() -> Iterator[ConfigLoader]:
    """Initialize Hydra with the shipped groups, also within a Hydra job; its errors become ValueErrors.

    Hydra gets a file of the group `algo` for each method of an installed package.
    """
    for name in entry_points.installed():
        ConfigStore.instance().store(name, {"name": name}, group="algo", provider=CONFIGS)
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


def parse(arguments: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Return the parsed overrides.

    Raises:
        ValueError: one cannot be parsed, deletes a setting, names a package, or has too many values.
    """
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
        if isinstance(swept, RangeSweep) and sum(1 for _ in islice(swept.range(), MAX_RUNS + 1)) > MAX_RUNS:
            raise ValueError(f"{text} has more than {MAX_RUNS} values; a sweep has at most {MAX_RUNS} runs")
        parsed.append(override)
    return parsed


def for_hydra(override: Override) -> bool:
    """Return whether an override is a setting of Hydra itself."""
    return re.split("[./]", override.key_or_group)[0] == "hydra"


def single(override: Override) -> Override:
    """Return the override; raise ValueError if it has several values."""
    if override.is_sweep_override():
        raise ValueError(f"{override.input_line} has several values; use `sequel run -m` to sweep over them")
    return override
