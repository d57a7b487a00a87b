"""Makes torchvision importable with a PyTorch build that does not fit its compiled extension.

Import this module before torchvision. If the extension cannot be loaded (a CUDA build of torchvision with a
CPU build of PyTorch), torchvision's import fails, because it describes two operators that are not declared.
This module declares them. Data sets, transforms, models and image grids then work, because they are plain
PyTorch; the detection operators raise an error when called. If the extension loads, nothing is declared.
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
"""The operators that torchvision describes at import, with the schemas of its C++ source."""


def _load_compiled_part(folder: str) -> None:
    """Load torchvision's extension, if it can be loaded."""
    compiled = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if compiled is not None and compiled.origin is not None:
        try:
            torch.ops.load_library(compiled.origin)
        except OSError:
            return


def declare_missing_operators() -> torch.library.Library | None:
    """Declare the operators that torchvision needs at import, if its extension does not.

    Returns:
        The library of the declarations, which last as long as it exists. None if torchvision is not
        installed, already imported, or complete.
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
"""Kept for the life of the process."""
