"""Code of the user's own in a configuration: what `_target_` names, and the arguments that it is called with.

    benchmark:
      _target_: own.data.Streams
      size: 100
      transform: {_target_: own.data.Invert}    # made first

Both keys mean what they mean to Hydra's `instantiate`; here paths and arguments are checked before anything
is made.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from inspect import Parameter
from types import MappingProxyType, ModuleType
from typing import Any, Unpack, get_args, get_origin, get_type_hints

TARGET = "_target_"
PARTIAL = "_partial_"
"""Beside `_target_`, true asks for a callable that has the arguments, in place of what it returns."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean X?` for the candidate that is most like the word, or an empty text."""
    match = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, or of a class's constructor; none where one cannot be read."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):
        return {}


@dataclass(frozen=True)
class Target:
    """Something to call, found by its dotted path, and the arguments to call it with.

    Args:
        key: where the configuration has it, for example `algo` or `benchmark.transform`.
        path: for example `package.module.Name`.
        arguments: by name; mappings with `_target_` among them, at any depth, are made first.
        function: what the path names.
        partial: whether to return a callable in place of what it returns.
    """

    key: str
    path: str
    arguments: Mapping[str, Any]
    function: Callable[..., Any] = field(compare=False, repr=False)
    partial: bool = False

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """What the signature has, by name; the options of an `Unpack[...]` one by one."""
        try:
            found = inspect.signature(self.function).parameters
            vague = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
            if inspect.isclass(self.function) and all(p.kind in vague for p in found.values()):
                own = inspect.signature(self.function.__init__).parameters  # NNX's metaclass hides it
                found = MappingProxyType({name: own[name] for name in list(own)[1:]})
        except (TypeError, ValueError):  # written in C, which does not tell
            return {"arguments": Parameter("arguments", Parameter.VAR_KEYWORD)}
        expanded: dict[str, Parameter] = {}
        for name, parameter in found.items():
            hint = hints_of(self.function).get(name) if parameter.kind is Parameter.VAR_KEYWORD else None
            if get_origin(hint) is Unpack:
                options = get_type_hints(get_args(hint)[0])
                expanded |= {key: Parameter(key, Parameter.KEYWORD_ONLY, default=None) for key in options}
            else:
                expanded[name] = parameter
        return expanded

    @property
    def named(self) -> dict[str, Parameter]:
        """The parameters that can be given by name."""
        kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
        return {name: parameter for name, parameter in self.parameters.items() if parameter.kind in kinds}

    @property
    def takes_any(self) -> bool:
        """Whether arguments of any name are taken."""
        return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in self.parameters.values())

    def check(self, supplied: Iterable[str] = ()) -> None:
        """Refuse arguments that do not fit the signature, of this target and of those within.

        Args:
            supplied: parameters that the caller fills.

        Raises:
            ValueError: an argument that the signature lacks, or one that it needs and nobody gives.
        """
        named = self.named
        for name, value in self.arguments.items():
            if name not in named and not self.takes_any:
                match = difflib.get_close_matches(name, named, n=1)
                hint = f"; its arguments are {', '.join(named) or 'none'}"
                hint = f"; did you mean {self.key}.{match[0]}?" if match else hint
                raise ValueError(f"{self.key}.{name} is not an argument of {self.path}{hint}")
            _check_within(f"{self.key}.{name}", value)
        given = {*self.arguments, *supplied}
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in given and not self.partial:
                raise ValueError(f"{self.key}.{name} is an argument that {self.path} needs; give it a value")

    def argument(self, name: str) -> Any:
        """Return the value of an argument: the given one, or the signature's default; None for neither."""
        default = self.named[name].default if name in self.named else None
        return self.arguments.get(name, None if default is Parameter.empty else default)

    def make(self, **supplied: Any) -> Any:
        """Call it.

        Args:
            supplied: further arguments, each passed only where the signature names it and the configuration
                does not give it.

        Raises:
            ValueError: that of the code, naming the key.
        """
        arguments = {name: _made(f"{self.key}.{name}", value) for name, value in self.arguments.items()}
        arguments |= {k: v for k, v in supplied.items() if k in self.named and k not in arguments}
        if self.partial:
            return partial(self.function, **arguments)
        try:
            return self.function(**arguments)
        except ValueError as error:
            known = str(error).partition(" ")[0] in self.named
            raise ValueError(f"{self.key}.{error}" if known else f"{self.key}: {error}") from error

    def plain(self) -> dict[str, Any]:
        """Return it as a configuration has it."""
        return {TARGET: self.path, **({PARTIAL: True} if self.partial else {}), **self.arguments}


def read(key: str, values: Mapping[str, Any]) -> Target:
    """Return the target that a mapping with `_target_` describes; what it names is imported.

    Args:
        key: where the configuration has it.
        values: `_target_`, perhaps `_partial_`, and arguments.

    Raises:
        ValueError: no such module or name, or an import that fails.
    """
    arguments = {str(name): value for name, value in values.items() if name not in (TARGET, PARTIAL)}
    path, lazy = values[TARGET], values.get(PARTIAL, False)
    function = _located(f"{key}.{TARGET}", path)
    if not callable(function):
        raise ValueError(f"{key}.{TARGET} must be something to call, got {path}, a {type(function).__name__}")
    if not isinstance(lazy, bool):
        raise ValueError(f"{key}.{PARTIAL} must be true or false, got {lazy!r}")
    return Target(key, path, arguments, function, lazy)


def _check_within(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        if TARGET in value:
            read(key, value).check()
        else:
            for name, item in value.items():
                _check_within(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_within(f"{key}.{i}", item)


def _made(key: str, value: Any) -> Any:
    """Return a value with all targets in it made; containers are copied."""
    if isinstance(value, Mapping):
        if TARGET in value:
            return read(key, value).make()
        return {name: _made(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_made(f"{key}.{i}", item) for i, item in enumerate(value)]
    return value


def _located(where: str, path: Any) -> Any:
    """Return what a dotted path names: the import of its first part, then attributes or submodules."""
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{where} must be a dotted path such as package.module.Name, got {path!r}")
    first, *parts = path.split(".")
    found: Any = _imported(where, path, first)
    if found is None:
        hint = nearest(first, (module.name for module in pkgutil.iter_modules()))
        raise ValueError(f"{where}={path}: there is no module {first}{hint}")
    name = first
    for part in parts:
        owner, name = name, f"{name}.{part}"
        inner = getattr(found, part, None)
        if inner is None and isinstance(found, ModuleType) and hasattr(found, "__path__"):
            inner = _imported(where, path, name)
        if inner is None:
            submodules = (module.name for module in pkgutil.iter_modules(getattr(found, "__path__", [])))
            hint = nearest(part, [*dir(found), *submodules])
            raise ValueError(f"{where}={path}: {owner} has no {part}{hint}")
        found = inner
    return found


def _imported(where: str, path: str, name: str) -> ModuleType | None:
    """Import a module; None where there is none of that name.

    Raises:
        ValueError: it is there, but raises while it is imported.
    """
    try:
        return import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{where}={path}: importing {name} failed with {text}") from error
