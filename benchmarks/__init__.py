"""Continual-learning benchmarks as arrays: streams of tasks, and the data sets that they are views of."""

if __name__ != "sequel_benchmarks":
    raise ImportError(
        f"this package is imported as sequel_benchmarks, not as {__name__}; install it with: pip install -e ."
    )

from sequel_benchmarks.colour import SplitCIFAR10, SplitCIFAR100, SplitImageFolder, SplitTinyImageNet
from sequel_benchmarks.data import DATASETS, DataSet, Fetched, available, data_directory, fetch, load
from sequel_benchmarks.digits import PermutedDigits, RotatedDigits, SplitDigits
from sequel_benchmarks.imagefolder import image_folder
from sequel_benchmarks.mnist import PermutedMNIST, RotatedMNIST, SplitMNIST
from sequel_benchmarks.own import (
    OwnOptions,
    from_arrays,
    from_avalanche,
    from_continuum,
    from_datamodules,
    from_datasets,
    from_prepared,
)
from sequel_benchmarks.streams import PermutedSettings, RotatedSettings, SplitSettings, permute, rotate, split
from sequel_core.stream.benchmark import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    cls.__name__.lower(): cls
    for cls in (
        SplitMNIST,
        PermutedMNIST,
        RotatedMNIST,
        SplitDigits,
        PermutedDigits,
        RotatedDigits,
        SplitCIFAR10,
        SplitCIFAR100,
        SplitTinyImageNet,
        SplitImageFolder,
    )
}
"""The benchmarks under the names that configs give them."""

__all__ = [
    "BENCHMARKS",
    "DATASETS",
    "Benchmark",
    "DataSet",
    "Fetched",
    "OwnOptions",
    "PermutedDigits",
    "PermutedMNIST",
    "PermutedSettings",
    "RotatedDigits",
    "RotatedMNIST",
    "RotatedSettings",
    "SplitCIFAR10",
    "SplitCIFAR100",
    "SplitDigits",
    "SplitImageFolder",
    "SplitMNIST",
    "SplitSettings",
    "SplitTinyImageNet",
    "available",
    "data_directory",
    "fetch",
    "from_arrays",
    "from_avalanche",
    "from_continuum",
    "from_datamodules",
    "from_datasets",
    "from_prepared",
    "image_folder",
    "load",
    "permute",
    "rotate",
    "split",
]
