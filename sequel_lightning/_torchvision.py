"""Makes torchvision importable beside a PyTorch build that its compiled part does not fit.

Import it before torchvision. Where the compiled part cannot be loaded (a CUDA build of torchvision beside a
CPU build of PyTorch), torchvision goes on without it, then fails at import all the same, because it
describes two operators that nobody has declared. Declaring them is enough: data sets, transforms, models
and image grids are plain PyTorch. The detection operators themselves stay unavailable and say so when
called. Where the compiled part loads, nothing is declared.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import find_spec

import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators that torchvision describes at import, as its own C++ source declares them."""


def _load_compiled_part(folder: str) -> None:
    """Load torchvision's extension, or go on without it where it does not load, as torchvision does."""
    compiled = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if compiled is not None and compiled.origin is not None:
        try:
            torch.ops.load_library(compiled.origin)
        except OSError:
            return


def declare_missing_operators() -> torch.library.Library | None:
    """Declare what torchvision needs at import and its compiled part does not bring.

    Returns:
        The library that holds the declarations (they last as long as it does), or None where none is needed:
        torchvision is not installed, already imported, or complete.
    """
    spec = find_spec("torchvision") if "torchvision" not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        return None
    _load_compiled_part(spec.submodule_search_locations[0])
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(SCHEMAS[name])
    return library


LIBRARY = declare_missing_operators()
"""Held for the life of the process."""
