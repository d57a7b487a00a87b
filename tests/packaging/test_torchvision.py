"""torchvision can be imported next to a PyTorch build that its compiled operators do not fit."""

import subprocess
import sys
import textwrap

# Loads only this module, without its package, before anything imports torchvision.
LOAD = """
import importlib.util, sys
[folder] = importlib.util.find_spec("sequel_lightning").submodule_search_locations
spec = importlib.util.spec_from_file_location("under_test", f"{folder}/_torchvision.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def run(code: str) -> str:
    """Return what a fresh interpreter prints; warnings are errors there as well."""
    program = textwrap.dedent(code).replace("LOAD", LOAD)
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_torchvision_and_packages_that_import_it_work_afterwards() -> None:
    out = run("""
        LOAD
        import torchvision, torchmetrics, pytorch_lightning, torch
        from torchvision.transforms.functional import rotate
        rotated = rotate(torch.arange(4.0).reshape(1, 2, 2), 90)  # counter-clockwise
        print(rotated.flatten().tolist(), module.declare_missing_operators())
    """)
    assert out == "[1.0, 3.0, 0.0, 2.0] None"


def test_both_operators_are_declared_if_the_compiled_library_does_not_load() -> None:
    out = run("""
        import torch
        def fails(path):
            raise OSError("libcudart.so: cannot open shared object file")
        torch.ops.load_library = fails
        LOAD
        schemas = [str(getattr(torch.ops.torchvision, name).default._schema) for name in ("nms", "qnms")]
        print(module.LIBRARY is not None, schemas, module.declare_missing_operators())
        import torchvision
    """)
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert out == f"True ['torchvision::nms{schema}', 'torchvision::qnms{schema}'] None"


def test_nothing_is_declared_if_the_compiled_library_loads() -> None:
    # the compiled library is simulated by its declarations; the argument `threshold` identifies them
    out = run("""
        import torch
        def loads(path):
            global library
            if "library" not in globals():
                library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        torch.ops.load_library = loads
        LOAD
        print(module.LIBRARY, torch.ops.torchvision.nms.default._schema)
    """)
    assert out == "None torchvision::nms(Tensor dets, Tensor scores, float threshold) -> Tensor"


def test_nothing_is_declared_without_torchvision() -> None:
    out = run("""
        import importlib.util, sys
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "torchvision" else original(name)
        LOAD
        import torch
        print(module.LIBRARY, hasattr(torch.ops.torchvision, "nms"))
    """)
    assert out == "None False"
