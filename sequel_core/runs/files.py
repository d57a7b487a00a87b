"""JSON and YAML files: written whole or not at all, read with limits on size and depth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

MAX_VALUES = 100_000
"""Number of values that a file may hold; each use of a YAML alias counts."""

MAX_DEPTH = 50
"""Number of lists and mappings that may be nested."""


def plain(name: str, value: Any, as_text: bool = False) -> Any:
    """Convert a value to dicts, lists, text, numbers, booleans and None.

    NumPy scalars become Python numbers, arrays and other iterables become lists, paths become text.

    Args:
        name: of the value, for errors.
        value: to be converted.
        as_text: convert values of other types with `str`.

    Raises:
        ValueError: part of the value has another type and `as_text` is False; the error names the part.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", item, as_text) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(f"{name}[{i}]", item, as_text) for i, item in enumerate(value)]
    if as_text:
        return str(value)
    raise ValueError(f"{name} must be a plain value (text, number, list, mapping), got {value!r}")


def to_json(name: str, value: Any, indent: int | None = None) -> str:
    """Return a value as JSON; nan and infinity become null.

    Args:
        name: of the value, for errors.
        value: see `plain`.
        indent: spaces per level; None for a single line.

    Raises:
        ValueError: part of the value is not plain.
    """
    finite = _finite(plain(name, value))
    return json.dumps(finite, indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Return a plain value with None for nan and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that does not name a file, such as that of a failed write."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, which is then renamed.

    Raises:
        OSError: the file could not be written; a previous file at this path is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with errors_naming(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; nan and infinity become null.

    Raises:
        ValueError: part of the value is not plain.
        OSError: the file could not be written.
    """
    write_bytes(path, (to_json(path.stem, value, indent=2) + "\n").encode())


def read_json(content: str | bytes) -> dict[str, Any]:
    """Parse JSON whose outermost value is a mapping.

    Integers of 300 digits and more become floats, mostly infinity.

    Raises:
        ValueError: the content is not JSON, not a mapping, or too large or too deep.
    """
    try:
        value = json.loads(content, parse_int=lambda text: int(text) if len(text) < 300 else float(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    _check_size(value)
    return value


def read_yaml(path: Path, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Read a YAML file.

    Args:
        path: of the file.
        load: parses the text; it must be safe for untrusted input.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8 or not YAML, or too large or too deep once aliases are expanded.
    """
    text = path.read_bytes().decode()
    try:
        _check_size(yaml.compose(text, yaml.SafeLoader))
        return load(text)
    except Exception as error:  # PyYAML's constructors raise errors of many types
        message = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(message or type(error).__name__) from error


def _check_size(root: Any) -> None:
    """Check a tree against `MAX_VALUES` and `MAX_DEPTH`.

    Args:
        root: values, or YAML nodes, in which an alias is the node that it refers to.

    Raises:
        ValueError: the tree is larger or deeper.
    """
    num_values, stack = 0, [(root, 0)]
    while stack:
        value, depth = stack.pop()
        num_values += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if num_values > MAX_VALUES:
            raise ValueError(f"it is more than {MAX_VALUES} values")
        stack += [(child, depth + 1) for child in _children(value)]


def _children(value: Any) -> Iterable[Any]:
    match value:
        case yaml.MappingNode():
            return chain(*value.value)
        case yaml.SequenceNode():
            return list(value.value)
        case dict():
            return value.values()
        case list():
            return value
    return ()
