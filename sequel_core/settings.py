"""Settings: frozen dataclasses with documented fields, validated by pydantic.

`setting` declares a field with its default, its meaning and its range. This text is written once; docstrings
(`help`), `sequel list`, error messages and the JSON schema of experiment files all show it.

A subclass is an ordinary dataclass. The pydantic class that validates it is made from its fields at the first
construction, because importing pydantic would add a quarter to the time of `import sequel_core`.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
TYPES = {  # of pydantic's errors
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "literal_error": "one of",
}


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
    """Declare a field of a `Settings` class.

    Args:
        default: the default value.
        help: what the field means, in words, without its range and its default.
        ge: lower bound, included. Bounds apply to numbers, also to those in a list.
        gt: lower bound, excluded.
        le: upper bound, included.
        lt: upper bound, excluded.
        only: the name of another field and the values of that field with which this one is used. With any
            other value, this field must keep its default.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "only": only}
    metadata = {"help": help, **{key: rule for key, rule in rules.items() if rule is not None}}
    return field(default=default, metadata=metadata)


def allowed(spec: Field[Any]) -> str:
    """Return the range of a field as text, for example `>= 0`; empty if it has none."""
    bounds = spec.metadata
    return " and ".join(f"{sign} {bounds[key]:g}" for key, sign in SIGNS.items() if key in bounds)


def choices_of(hint: Any) -> list[Any]:
    """Return the values of the Literals in an annotation, without those in its tuples."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return [value for option in options for value in choices_of(option)]


def nearest(word: str, candidates: Iterable[str] | Mapping[str, str]) -> str:
    """Return `; did you mean X?` for the candidate closest to a word, or an empty text.

    A word that begins with a candidate is close, too: `class-incremental` to `class`.

    Args:
        word: the word.
        candidates: words, or a mapping of words to the texts that are shown for them.
    """
    shown = candidates if isinstance(candidates, Mapping) else {name: name for name in candidates}
    beginnings = sorted((name for name in shown if len(name) > 2 and word.startswith(name)), key=len)
    match = get_close_matches(word, shown, n=1) or beginnings[-1:]
    return f"; did you mean {shown[match[0]]}?" if match else ""


def with_arguments(
    doc: str | None,
    specs: Iterable[Field[Any]],
    error: str = "a setting has the wrong type or is out of range",
) -> str:
    """Return a docstring whose `Args` section lists fields with their meaning, range and default.

    Args:
        doc: the docstring. Its `Args` section may describe other fields.
        specs: the fields.
        error: description of the ValueError, if the docstring has no `Raises` section.
    """
    text = inspect.cleandoc(doc or "")
    heads = [text.find(f"\n\n{head}:") for head in ("Raises", "Example")]
    end = min((at for at in heads if at >= 0), default=len(text))
    lines = []
    for spec in (spec for spec in specs if "help" in spec.metadata):
        default = "" if spec.default is MISSING else f"default {spec.default!r}"
        facts = [spec.metadata["help"], allowed(spec), default]
        if "only" in spec.metadata:
            other, *values = spec.metadata["only"]
            facts.append(f"only used with {other}={' or '.join(map(repr, values))}")
        line = f"    {spec.name}: {'; '.join(fact for fact in facts if fact)}."
        lines.append(textwrap.fill(line, 100, subsequent_indent=" " * 8))
    head = "" if "\n\nArgs:\n" in text[:end] or not lines else "\n\nArgs:"
    raises = "" if "\n\nRaises:" in text else f"\n\nRaises:\n    ValueError: {error}."
    return "\n".join([text[:end] + head, *lines]) + raises + text[end:]


def as_text(value: Any) -> str:
    """Return a value as a configuration file writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass that validates its fields; declare them with `setting`.

    Numbers may be NumPy scalars, a whole number may be a float such as 2.0, and a list may be any iterable.
    Text, truth values and names must have exactly their type.

    Raises:
        ValueError: a value has the wrong type or is out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Decay(Settings):
        ...     rate: float = setting(0.5, "factor per task", gt=0, le=1)
        >>> Decay(rate=1)
        Decay(rate=1.0)
        >>> Decay(rate=2)
        Traceback (most recent call last):
        ValueError: rate must be > 0 and <= 1, got 2.0
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared = {name: spec for name, spec in vars(cls).items() if isinstance(spec, Field)}
        for name, spec in declared.items():
            spec.name = name  # as `dataclass` does after this method
        bases = [base for base in reversed(cls.__mro__[1:]) if is_dataclass(base)]
        specs = {spec.name: spec for base in bases for spec in fields(base)} | declared
        cls.__doc__ = with_arguments(vars(cls).get("__doc__"), specs.values())

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        cls: Any = type(self)
        try:
            valid = vars(model_of(cls)(**vars(self)))
        except ValidationError as error:
            ranges = {spec.name: allowed(spec) for spec in fields(self)}
            raise ValueError(_one_line(error.errors(), ranges)) from None
        for name, value in valid.items():
            object.__setattr__(self, name, value)
        for spec in (spec for spec in fields(self) if "only" in spec.metadata):
            other, *values = spec.metadata["only"]
            if getattr(self, other) not in values and getattr(self, spec.name) != spec.default:
                given, beside = as_text(getattr(self, spec.name)), as_text(getattr(self, other))
                needed = f"{other}={' or '.join(map(as_text, values))}"
                raise ValueError(
                    f"{spec.name} is only used with {needed}, got {spec.name}={given} with {other}={beside}; "
                    f"set {needed} or leave {spec.name} out"
                )


@cache
def model_of(cls: type[Any]) -> Any:
    """Return the pydantic dataclass that validates the fields of a dataclass, which `setting` made."""
    from pydantic import Field as Description
    from pydantic.dataclasses import dataclass as pydantic_dataclass

    hints = get_type_hints(cls)
    members = []
    for spec in fields(cls):
        description = Description(description=spec.metadata.get("help"))
        annotation: Any = Annotated[_checked(hints[spec.name], spec.metadata), description]
        members.append((spec.name, annotation, field(default=spec.default)))
    config: Any = {"strict": True, "allow_inf_nan": False}
    return pydantic_dataclass(make_dataclass(cls.__name__, members, kw_only=True), config=config)


def _checked(hint: Any, metadata: Mapping[str, Any]) -> Any:
    """Return an annotation with the bounds of its numbers and the conversions that `Settings` describes."""
    from pydantic import BeforeValidator
    from pydantic import Field as Bounds

    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return Union[tuple(_checked(option, metadata) for option in args)]  # noqa: UP007 - made at run time
    if origin is os.PathLike:  # a configuration writes paths as text
        return str
    if origin is tuple:
        item: Any = _checked(args[0], metadata)
        return Annotated[tuple[item, ...], BeforeValidator(_as_tuple)]
    if hint in (int, float):
        bounds = {key: metadata[key] for key in SIGNS if key in metadata}
        return Annotated[hint, Bounds(**bounds), BeforeValidator(_as_int if hint is int else _as_float)]
    return hint if origin is Literal or hint in (bool, str, type(None)) else Any


# Each of these functions converts what it can. It returns anything else unchanged, for pydantic to reject.


def _as_float(value: Any) -> Any:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return value
    try:
        return float(value)
    except OverflowError:  # an int with hundreds of digits
        return math.inf
    except TypeError:  # an array
        return value


def _as_int(value: Any) -> Any:
    number = _as_float(value)
    if not isinstance(number, float) or not number.is_integer():
        return number
    if int(value).bit_length() >= 64:
        raise ValueError("64 bits")
    return int(value)


def _as_tuple(value: Any) -> Any:
    iterable = hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping | Set)
    return tuple(value) if iterable else value


def _one_line(errors: Sequence[Any], ranges: Mapping[str, str]) -> str:
    """Return `NAME must be RULE, got VALUE` for the first field with an error.

    A value of no type in a union has one error per type. Errors about an item of a list, or about a range,
    are more specific than errors about a type.
    """
    name = errors[0]["loc"][0]
    errors = [error for error in errors if error["loc"][0] == name]
    depth = max(len(error["loc"]) for error in errors)
    errors = [error for error in errors if len(error["loc"]) == depth]
    errors = [error for error in errors if error["type"] not in TYPES] or errors
    value = errors[0]["input"]
    names = [name for error in errors for name in _names(error)]
    rules = " or ".join(dict.fromkeys(_rule(error, ranges[name]) for error in errors))
    return f"{name} must be {rules}, got {value!r}{nearest(str(value), names)}"


def _rule(error: Any, bounds: str) -> str:
    """Return what a value must be, from a pydantic error."""
    error_type = error["type"]
    if error_type in TYPES:
        details = {"int_type": bounds, "float_type": bounds, "literal_error": ", ".join(_names(error))}
        return f"{TYPES[error_type]} {details.get(error_type, '')}".strip()
    if error_type == "finite_number" and "<" not in bounds:
        return f"{bounds} and finite".removeprefix(" and ")
    if error_type == "value_error" and "<" not in bounds:  # of `_as_int`
        return f"a whole number of less than 64 bits and {bounds}".removesuffix(" and ")
    return bounds


def _names(error: Any) -> list[str]:
    """Return the names in the context of a `literal_error`."""
    return re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))


def check_name(key: str, value: Any, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, if a value is not one of the names."""
    names = list(names)
    if value not in names:
        hint = nearest(str(value), names)
        raise ValueError(f"{key} must be one of {', '.join(names)}, got {value!r}{hint}")
