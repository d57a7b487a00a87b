"""Settings as frozen dataclasses whose fields carry their ranges.

Construction checks every field and raises a ValueError that names the field, the rule and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import Field, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    only: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a field with its meaning and the range of its numbers.

    `only` names another field and the values of it with which alone this one is read; beside any other value
    it must keep its default.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "only": only}
    metadata = {"help": help, **{key: rule for key, rule in rules.items() if rule is not None}}
    return field(default=default, metadata=metadata)


def allowed(spec: Field[Any]) -> str:
    """Return the range of a field as text, for example `>= 0`; empty where there is none."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{signs[key]} {spec.metadata[key]:g}" for key in signs if key in spec.metadata)


def _check_number(name: str, value: float, spec: Field[Any]) -> None:
    rule = allowed(spec)
    bounds = spec.metadata
    if isinstance(value, int) and abs(value) >= 2**63:
        rule += f"{' and ' if rule else ''}of less than 64 bits"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    if math.isinf(value) and not {"le", "lt"} & bounds.keys():
        rule += f"{' and ' if rule else ''}finite"
    fits = (
        math.isfinite(value)
        and value >= bounds.get("ge", -math.inf)
        and value > bounds.get("gt", -math.inf)
        and value <= bounds.get("le", math.inf)
        and value < bounds.get("lt", math.inf)
    )
    if not fits:
        raise ValueError(f"{name} must be {rule or 'finite'}, got {value!r}")


def _coerce(name: str, value: Any, hint: Any, spec: Field[Any]) -> Any:
    """Return the value as the type that the field is annotated with, or raise ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(name, value, option, spec)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0] if len(errors) == 1 else " or ".join(errors))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str | bytes | Mapping | Set) or not hasattr(value, "__iter__"):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_coerce(name, item, args[0], spec) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
        return value
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number{_and_range(spec)}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if hint is int:
        if not math.isfinite(number) or value != int(value):
            raise ValueError(f"{name} must be a whole number{_and_range(spec)}, got {value!r}")
        number = int(value)
    _check_number(name, number, spec)
    return number


def _told(value: Any) -> str:
    """Return a value as a configuration has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _and_range(spec: Field[Any]) -> str:
    return f" {allowed(spec)}" if allowed(spec) else ""


@dataclass(frozen=True)
class Settings:
    """A group of checked settings; see `setting`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = _coerce(spec.name, getattr(self, spec.name), hints[spec.name], spec)
            object.__setattr__(self, spec.name, value)
        for spec in (spec for spec in fields(self) if "only" in spec.metadata):
            other, *wanted = spec.metadata["only"]
            value, beside = getattr(self, spec.name), getattr(self, other)
            if beside not in wanted and value != spec.default:
                told = f"{other}={' or '.join(map(_told, wanted))}"
                raise ValueError(
                    f"{spec.name} is read with {told} alone, got {spec.name}={_told(value)} with "
                    f"{other}={_told(beside)}; set {told} or leave {spec.name} out"
                )
