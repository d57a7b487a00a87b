"""The optimizer factory of a module: what it may be, and what it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer] | Callable[..., Any]
"""The first is what LightningCLI makes of a class of optimizers; the second also returns schedulers."""
NAMED = "named_parameters"
EXAMPLE = "partial(torch.optim.{}, lr=0.1)"


def check_factory(optimizer: Any) -> None:
    """Raise ValueError if an optimizer itself, or anything else that cannot be called, is given."""
    if not callable(optimizer):
        name = type(optimizer).__name__
        example = EXAMPLE.format(name if isinstance(optimizer, Optimizer) else "SGD")
        raise ValueError(
            "optimizer must be a factory, which is called with the parameters when each task starts, got an "
            f"object of class {name}; pass {example}"
        )


def make_optimizer(factory: OptimizerFactory, named: Iterable[tuple[str, nn.Parameter]]) -> Any:
    """Return what the factory makes of the parameters.

    A factory with a parameter called `named_parameters` gets pairs of a name and a parameter in it, as
    `torch.nn.Module.named_parameters` yields them. Any other gets the parameters as its first argument.

    Args:
        factory: for example `partial(torch.optim.SGD, lr=0.1)`.
        named: the trained parameters with their names.

    Raises:
        ValueError: the factory returns None.
    """
    pairs = list(named)
    make: Callable[..., Any] = factory
    takes_names = NAMED in inspect.signature(make).parameters
    made = make(**{NAMED: pairs}) if takes_names else make([p for _, p in pairs])
    if made is None:
        raise ValueError(
            "optimizer must return an optimizer, or what configure_optimizers may return, got None; add a "
            "return statement to the factory"
        )
    return made
