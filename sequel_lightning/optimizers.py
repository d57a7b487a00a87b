"""The optimizer of a module: its factory, its learning rate, and the state that tasks carry over."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from sequel_lightning.algorithm import Algorithm

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


def configured_optimizer(module: Algorithm) -> Any:
    """Return what the factory makes, with the task's learning rate and, unless it is reset, the last state.

    Raises:
        ValueError: nothing is trained, or a scheduler cannot be used.
    """
    names, hparams = module.lifecycle.names_of_trained(), module.algorithm_hparams
    if not names:
        raise ValueError(
            f"{hparams.name} needs a parameter to train, got a network whose parameters all have "
            "requires_grad=False; call requires_grad_() on what is to be trained"
        )
    configured = make_optimizer(module.optimizer_factory, ((name, p) for p, name in names.items()))
    if not isinstance(configured, Optimizer):
        check_scheduler(module)
        return configured
    rates = [group["lr"] if module.lr is None else module.lr for group in configured.param_groups]
    if module.lifecycle.carried_optimizer is not None and not hparams.reset_optimizer:
        carried = copy.deepcopy(module.lifecycle.carried_optimizer)  # the optimizer would share the tensors
        carry_over(carried, configured, names)
    task = module.lifecycle.current_index()
    for group, rate in zip(configured.param_groups, rates, strict=True):
        group["lr"] = rate * hparams.learning_rate_factor(task, rate) if hparams.lr_decay != 1.0 else rate
    return configured


def check_scheduler(module: Algorithm) -> None:
    """Raise ValueError if the module cannot use a learning-rate scheduler."""
    hparams = module.algorithm_hparams
    if not module.automatic_optimization:
        raise ValueError(f"{hparams.name} takes its steps itself, without a scheduler; leave it out")
    if hparams.lr_decay != 1.0:
        raise ValueError(
            f"lr_decay={hparams.lr_decay} and a learning-rate scheduler both set the learning rate; "
            "use lr_decay=1 or an optimizer alone"
        )
    if module.lr is not None:
        raise ValueError(
            f"module.lr={module.lr} and a learning-rate scheduler both set the learning rate; give the "
            "factory this rate and set module.lr=None"
        )


def named_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return the state of an optimizer, with the name of each of its parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {**optimizer.state_dict(), "names": [names.get(p, str(i)) for i, p in enumerate(params)]}


def carry_over(carried: dict[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Load a state of `named_state`; if the parameters have changed, the state of those that remain."""
    current = named_state(optimizer, names)
    same_groups = len(carried["param_groups"]) == len(current["param_groups"])
    if carried.setdefault("names", current["names"]) != current["names"] or not same_groups:
        index = {name: i for i, name in enumerate(carried["names"])}
        states = {i: carried["state"].get(index.get(name)) for i, name in enumerate(current["names"])}
        carried = {**current, "state": {i: state for i, state in states.items() if state is not None}}
    optimizer.load_state_dict(carried)
