"""The JSON schema of experiment files, from the pydantic models of the settings."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from sequel_core.experiment.aliases import NAMES, SECTIONS, SPELLINGS
from sequel_core.experiment.build import Shape
from sequel_core.experiment.schema import (
    CLASSES,
    DOCUMENTATION,
    EVALUATION,
    Expected,
    ExperimentConfig,
    choices,
    settings,
    settings_class,
    summary,
)
from sequel_core.experiment.target import PARTIAL, TARGET
from sequel_core.settings import model_of

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{.+\}"}
USER_CODE: Schema = {
    "type": "object",
    "description": "user code: a dotted path, and the arguments to call it with",
    "properties": {
        TARGET: {"type": "string", "description": "dotted path, for example package.module.Name"},
        PARTIAL: {
            "type": "boolean",
            "description": "pass the callable with its arguments, without calling it",
        },
    },
    "required": [TARGET],
}


def json_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of experiment files.

    It has the sections with all their choices, and for each setting its meaning, range, default and other
    spellings. A value may also be an interpolation such as `${seed}`.

    Example:
        >>> schema = json_schema()
        >>> schema["properties"]["training"]["properties"]["batch_size"]["description"]
        'number of training samples per step, of all devices together'
    """
    top = _properties(ExperimentConfig)
    sections: Schema = {key: _section(key) for key in SECTIONS}
    for key in CLASSES.keys() - SECTIONS.keys():
        sections[key] = _object(_properties(CLASSES[key]), summary(key))
    properties: Schema = {"mode": top["mode"], **sections, "logger": _loggers(), "wandb": _logger("wandb")}
    properties |= {
        "callbacks": {"anyOf": [NULL, USER_CODE, {"type": "array", "items": USER_CODE}, _named(USER_CODE)]},
        **{key: top[key] for key in EVALUATION},
        **{key: {"description": "recorded only"} for key in DOCUMENTATION},
        "expected": {**_object(_properties(Expected), "published results"), "additionalProperties": True},
    }
    for old, new in SPELLINGS.items():
        _add_spelling(properties, old.split("."), new.split("."))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "SequeL experiment",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _properties(cls: Any) -> Schema:
    """Return the schema of each setting of a class; a value may also be an interpolation."""
    properties = {}
    for key, schema in TypeAdapter(model_of(cls)).json_schema()["properties"].items():
        about = {name: schema.pop(name) for name in ("description", "default") if name in schema}
        del schema["title"]
        properties[key] = {**about, "anyOf": [*schema.get("anyOf", [schema]), INTERPOLATION]}
    return properties


def _object(properties: Schema, description: str) -> Schema:
    """Return the schema of a group of settings."""
    return {
        "description": description,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _section(section: str) -> Schema:
    """Return the schema of a section that a name selects: the name, settings with the name, or user code."""
    key = SECTIONS[section]
    other_names = NAMES[f"{section}.{key}"]
    options = []
    for name in choices(section):
        names = [name, *(other for other, canonical in other_names.items() if canonical == name)]
        every = _properties(settings_class(section, name))
        properties = {key: {"enum": names}, **{spec.key: every[spec.key] for spec in settings(section, name)}}
        if section == "backbone":
            properties["num_classes"] = {"description": "number of classes of the benchmark"}
            properties |= _properties(Shape) if name == "mlp" else {}
        options.append(_object(properties, summary(section, name)))
    return {"anyOf": [{"enum": [*choices(section), *other_names]}, *options, USER_CODE]}


def _logger(name: str) -> Schema:
    about = {
        spec.key: {"description": spec.help, "default": spec.default} for spec in settings("logger", name)
    }
    return {"type": ["object", "null"], "properties": about, "additionalProperties": False}


def _loggers() -> Schema:
    """Return the schema of `logger`: names, user code, or a mapping of names to settings."""
    names: Schema = {"enum": choices("logger")}
    several = {"type": "array", "items": {"anyOf": [names, USER_CODE]}}
    mapping = {**_named(USER_CODE), "properties": {name: _logger(name) for name in choices("logger")}}
    return {"anyOf": [NULL, names, USER_CODE, several, mapping]}


def _named(item: Schema) -> Schema:
    """Return the schema of a mapping of any names to items or null."""
    return {"type": "object", "additionalProperties": {"anyOf": [item, NULL]}}


def _add_spelling(properties: Schema, old: list[str], new: list[str]) -> None:
    """Add another spelling of a setting to the groups that it may be written in."""
    sources = _groups(properties, new[0])
    if len(old) == 1:
        properties[old[0]] = next(source[new[1]] for source in sources if new[1] in source)
    elif old[0] == new[0]:
        for source in sources:
            source |= {old[1]: source[new[1]]} if new[1] in source else {}
    else:
        for target in _groups(properties, old[0]):
            target[old[1]] = next(source[new[1]] for source in sources if new[1] in source)


def _groups(properties: Schema, section: str) -> list[Schema]:
    """Return the properties of each choice of a section."""
    options = properties[section].get("anyOf", [properties[section]])
    return [option["properties"] for option in options if option.get("additionalProperties") is False]
