"""Tensors that a module keeps by name, and those that follow the trained parameters of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sequel_core.stream.trees import Tree, named_leaves
from sequel_lightning._compat import ConvertHook, LoadHook, foreach_copy_

Params = dict[str, Tensor]


class StateTree(ConvertHook, LoadHook):
    """Tensors by name, as buffers: they move, checkpoint and load into a fresh module."""

    def __init__(self, tensors: Params) -> None:
        """Hold these tensors."""
        super().__init__()
        self._tensors: Params = {}  # the buffers by their names; made again if empty
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor)

    def get(self) -> Params:
        """Return the tensors by name."""
        if not self._tensors:
            self._tensors = {name.replace("/", "."): t for name, t in self.named_buffers()}
        return self._tensors

    def set(self, tensors: Params) -> None:
        """Copy new values into the tensors of these names."""
        if tensors:
            foreach_copy_([self.get()[name] for name in tensors], list(tensors.values()))

    def after_convert(self) -> None:
        """Forget the tensors that were replaced."""
        self._tensors = {}

    def before_load(self, state_dict: Any, prefix: str) -> None:
        """Forget the tensors, which may be replaced."""
        self._tensors = {}


class ParameterTree(StateTree):
    """A tensor for each parameter of a network that is or was trained, by the parameter's name.

    Args:
        params: the trained parameters.
        fresh: makes the tensor of a newly trained parameter, for example a copy of it.
    """

    def __init__(self, params: Params, fresh: Callable[[Tensor], Tensor]) -> None:
        super().__init__({})
        self.fresh = fresh
        self._hold(params)

    def follow(self, params: Params, first: bool) -> None:
        """Add the trained parameters that are new; before the first task, leave out all others.

        Raises:
            ValueError: a parameter has another shape than in the tasks before.
        """
        if first:
            self.adopt(params)
        for name, tensor in self.get().items():
            if name in params and tensor.shape != params[name].shape:
                raise ValueError(
                    f"the trained parameter {name} must keep its shape from task to task, got "
                    f"{list(params[name].shape)} after {list(tensor.shape)}; make the network large enough "
                    "for all tasks, or give a new layer a new name"
                )
        self._hold(params)

    def adopt(self, params: Params) -> None:
        """Hold a tensor for each of these parameters, and for no other; without any, change nothing."""
        if params:
            for name, tensor in dict(self.get()).items():
                if name not in params or tensor.shape != params[name].shape:
                    delattr(self, name.replace(".", "/"))
            self._tensors = {}
            self._hold(params)

    def _hold(self, params: Params) -> None:
        held = self.get()
        for name in [name for name in params if name not in held]:
            self.register_buffer(name.replace(".", "/"), self.fresh(params[name].detach()))
        self._tensors = {}


class SumTree(ParameterTree):
    """Sums over samples or steps, 0 at first: in float32 or wider, whatever the dtype of the weights."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, zero_sum)

    def converted(self, tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the converted sum, with its previous dtype if the new one is narrower than float32."""
        new = convert(tensor)
        return new if new.dtype == sum_dtype(new.dtype) else tensor.to(new.device)


def adopt_names(module: Any, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Let each `ParameterTree` of a module hold the parameters that it holds in a checkpoint.

    The network's `start_task` is called for the tasks of the checkpoint before, as it may add parameters.

    Args:
        module: a ContinualModule.
        state_dict: of the checkpoint, which is loaded afterwards.
        prefix: of the module's names in it.
    """
    index = state_dict.get(f"{prefix}task_index")
    if index is not None:
        module.lifecycle.start_network(int(index))
    params = dict(module.net.named_parameters())
    for name, tree in module.named_modules():
        if isinstance(tree, ParameterTree):
            start = f"{prefix}{name}."
            names = {key.removeprefix(start) for key in state_dict if key.startswith(start)}
            tree.adopt({k: p for k, p in params.items() if k.replace(".", "/") in names})


def tree_map(function: Callable[..., Tensor], tree: Params, *others: Params) -> Params:
    """Return `function(a, *b)` by name, of each tensor and of the tensors of that name in the other trees.

    Args:
        function: of one tensor from each tree.
        tree: gives the names of the result.
        others: may have further names, which are left out.
    """
    return {k: function(a, *(other[k] for other in others)) for k, a in tree.items()}


def named_tensors(parts: Mapping[str, Tree]) -> Params:
    """Return the tensors of trees by name, for a `StateTree`; parts that are None have none."""
    named = (named_leaves(tree, name) for name, tree in parts.items() if tree is not None)
    return {name: tensor for leaves in named for name, tensor in leaves}


def tree_of(tensors: Params, specs: Tree, name: str) -> Tree:
    """Return the tree with the structure of `specs` whose tensors `named_tensors` has named."""
    if isinstance(specs, Mapping):
        return {k: tree_of(tensors, spec, f"{name}.{k}") for k, spec in specs.items()}
    return tensors[name]


def restricted(tree: Params, names: Iterable[str]) -> Params:
    """Return the tensors of these names."""
    return {k: tree[k] for k in names}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tensors of a dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def zero_sum(like: Tensor) -> Tensor:
    """Return zeros to sum up tensors like this one."""
    return torch.zeros_like(like, dtype=sum_dtype(like.dtype))
