"""Where a replay memory is, and in which dtype: the settings `mem_device` and `mem_dtype`."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from sequel_core.stream.trees import tree_map
from sequel_lightning._compat import buffers_of
from sequel_lightning.trees import Params, StateTree


class MemoryTree(StateTree):
    """The tensors of a memory. Conversions of the module, such as `double()`, do not change their dtypes.

    Args:
        tensors: by name.
        host: whether they stay in host memory if the module is moved.
        follows: names of tensors whose dtype is that of the network.
    """

    def __init__(self, tensors: Params, host: bool, follows: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.host, self.follows = host, follows

    def converted(self, tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a tensor on its device and in its dtype."""
        like = convert(tensor[:0])  # shows both; a large memory is not copied to the device
        follows = any(tensor is buffers_of(self).get(name) for name in self.follows)
        return tensor.to(tensor.device if self.host else like.device, like.dtype if follows else tensor.dtype)


def to_device(samples: Any, device: torch.device) -> Any:
    """Return a NamedTuple of trees of tensors on a device."""
    if samples.t.device == device:
        return samples

    def move(part: Any) -> Any:
        return part if part is None or isinstance(part, int) else tree_map(methodcaller("to", device), part)

    return type(samples)(*map(move, samples))
