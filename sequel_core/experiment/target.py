"""User code in a configuration: what `_target_` names, made by Hydra's `instantiate`.

    benchmark:
      _target_: my_package.data.Streams
      size: 100
      transform: {_target_: my_package.data.Invert}    # made first

Paths are resolved, and arguments are compared with signatures, before anything is made.
"""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import Parameter
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from sequel_core.settings import nearest

TARGET = "_target_"
PARTIAL = "_partial_"
"""Beside `_target_`: with true, a callable with these arguments is made, and not called."""


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function or of a constructor; empty if one cannot be evaluated."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):
        return {}


@dataclass(frozen=True)
class Target:
    """A callable, given by its dotted path, and its arguments.

    Args:
        key: its place in the configuration, for example `algo` or `benchmark.transform`.
        path: its dotted path, for example `package.module.Name`.
        arguments: its arguments by name. Mappings with `_target_` in them, at any depth, are made first.
        function: what the path names.
        partial: whether `make` returns a callable instead of calling it.
    """

    key: str
    path: str
    arguments: Mapping[str, Any]
    function: Callable[..., Any] = field(compare=False, repr=False)
    partial: bool = False

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters of the signature by name; the options of an `Unpack[...]` are listed singly."""
        variadic = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
        try:
            parameters = dict(inspect.signature(self.function).parameters)
            if inspect.isclass(self.function) and all(p.kind in variadic for p in parameters.values()):
                # The metaclass of NNX hides the constructor's signature.
                parameters = dict(inspect.signature(self.function.__init__).parameters)
                del parameters[next(iter(parameters))]  # self
        except (TypeError, ValueError):  # written in C, without a signature
            return {"arguments": Parameter("arguments", Parameter.VAR_KEYWORD)}
        for name in [name for name, p in parameters.items() if p.kind is Parameter.VAR_KEYWORD]:
            hint = hints_of(self.function).get(name)
            if get_origin(hint) is Unpack:
                del parameters[name]
                options = get_type_hints(get_args(hint)[0])
                parameters |= {key: Parameter(key, Parameter.KEYWORD_ONLY, default=None) for key in options}
        return parameters

    @property
    def named(self) -> dict[str, Parameter]:
        """The parameters that can be given by name."""
        kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
        return {name: parameter for name, parameter in self.parameters.items() if parameter.kind in kinds}

    def check(self, supplied: Iterable[str] = ()) -> None:
        """Check the arguments of this target, and of those in its arguments, against the signatures.

        Args:
            supplied: parameters that `make` will be given.

        Raises:
            ValueError: an argument that the signature lacks, or a required one that is missing.
        """
        named = self.named
        takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in self.parameters.values())
        for name, value in self.arguments.items():
            if name not in named and not takes_any:
                hint = nearest(name, {known: f"{self.key}.{known}" for known in named})
                hint = hint or f"; its arguments are {', '.join(named) or 'none'}"
                raise ValueError(f"{self.key}.{name} is not an argument of {self.path}{hint}")
            _check_nested(f"{self.key}.{name}", value)
        required = [name for name, parameter in named.items() if parameter.default is Parameter.empty]
        missing = [name for name in required if name not in (*self.arguments, *supplied)]
        if missing and not self.partial:
            raise ValueError(
                f"{self.key}.{missing[0]} is an argument that {self.path} needs; give it a value"
            )

    def argument(self, name: str) -> Any:
        """Return the value of an argument, or the default in the signature; None if there is neither."""
        default = self.named[name].default if name in self.named else None
        return self.arguments.get(name, None if default is Parameter.empty else default)

    def make(self, **supplied: Any) -> Any:
        """Call the function, after making the targets in its arguments.

        Args:
            supplied: further arguments. One is passed only if the signature names it and the configuration
                does not give it.

        Raises:
            ValueError: raised by the function; the message names the key.
        """
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        supplied = {k: v for k, v in supplied.items() if k in self.named and k not in self.arguments}
        try:
            function = partial(instantiate({**self.plain(), PARTIAL: True}, _convert_="all"), **supplied)
            return function if self.partial else function()
        except InstantiationException as error:  # of a target in the arguments
            cause = error.__cause__ or error
            if not isinstance(cause, ValueError | InstantiationException):
                raise cause from None
            place = str(error).rpartition("full_key: ")[2]
            raise ValueError(f"{self.key}.{place}: {' '.join(str(cause).split())}") from error
        except ValueError as error:
            named = str(error).partition(" ")[0] in self.named
            raise ValueError(f"{self.key}{'.' if named else ': '}{error}") from error

    def plain(self) -> dict[str, Any]:
        """Return the target as a configuration writes it."""
        return {TARGET: self.path, **({PARTIAL: True} if self.partial else {}), **self.arguments}


def read(key: str, values: Mapping[str, Any]) -> Target:
    """Return the target that a mapping with `_target_` describes; its module is imported.

    Args:
        key: the place of the mapping in the configuration.
        values: `_target_`, the arguments, and perhaps `_partial_`.

    Raises:
        ValueError: the path names nothing, or the import fails.
    """
    arguments = {str(name): value for name, value in values.items() if name not in (TARGET, PARTIAL)}
    path, deferred = values[TARGET], values.get(PARTIAL, False)
    function = _located(f"{key}.{TARGET}", path)
    if not callable(function):
        raise ValueError(f"{key}.{TARGET} must be callable, got {path}, a {type(function).__name__}")
    if not isinstance(deferred, bool):
        raise ValueError(f"{key}.{PARTIAL} must be true or false, got {deferred!r}")
    return Target(key, path, arguments, function, deferred)


def _check_nested(key: str, value: Any) -> None:
    if isinstance(value, Mapping) and TARGET in value:
        read(key, value).check()
    elif isinstance(value, Mapping | list | tuple):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_nested(f"{key}.{name}", item)


def _located(key: str, path: Any) -> Any:
    """Return what a dotted path names; raise ValueError with the nearest name if it names nothing."""
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{key} must be a dotted path such as package.module.Name, got {path!r}")
    owner, owner_path = None, ""
    for part in path.split("."):
        inner_path = f"{owner_path}.{part}".lstrip(".")
        try:
            inner = pydoc.locate(inner_path)
        except pydoc.ErrorDuringImport as error:
            text = " ".join(f"{type(error.value).__name__}: {error.value}".split())
            raise ValueError(f"{key}={path}: importing {inner_path} failed with {text}") from error
        if inner is None:
            modules = pkgutil.iter_modules(getattr(owner, "__path__", []) if owner_path else None)
            hint = nearest(part, [*(dir(owner) if owner_path else ()), *(module.name for module in modules)])
            what = f"{owner_path} has no {part}" if owner_path else f"there is no module {part}"
            raise ValueError(f"{key}={path}: {what}{hint}")
        owner, owner_path = inner, inner_path
    return owner
