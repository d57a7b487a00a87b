"""Continual-learning benchmarks: streams of tasks, as views of data sets that are held in arrays."""

if __name__ != "sequel_benchmarks":
    raise ImportError(
        f"this package is imported as sequel_benchmarks, not as {__name__}; install it with: pip install -e ."
    )

from sequel_benchmarks.builtin import (
    BENCHMARKS,
    BreastCancer,
    Diabetes,
    MarkovChains,
    PermutedDigits,
    PermutedMNIST,
    RotatedDigits,
    RotatedMNIST,
    SplitCIFAR10,
    SplitCIFAR100,
    SplitDigits,
    SplitImageFolder,
    SplitMNIST,
    SplitTinyImageNet,
    Wine,
)
from sequel_benchmarks.data import DATASETS, DataSet, Fetched, available, data_directory, fetch, load
from sequel_benchmarks.imagefolder import image_folder
from sequel_benchmarks.streams import PermutedSettings, RotatedSettings, SplitSettings, permute, rotate, split
from sequel_benchmarks.tables import TABLES, Table, load_table
from sequel_benchmarks.tabular import TabularSettings, tabular
from sequel_benchmarks.tokens import MarkovSettings, markov_chains
from sequel_benchmarks.user_data import (
    UserDataOptions,
    from_arrays,
    from_avalanche,
    from_continuum,
    from_datamodules,
    from_datasets,
    from_huggingface,
    from_prepared,
)
from sequel_core.stream.benchmark import Benchmark

__all__ = [
    "BENCHMARKS",
    "DATASETS",
    "TABLES",
    "Benchmark",
    "BreastCancer",
    "DataSet",
    "Diabetes",
    "Fetched",
    "MarkovChains",
    "MarkovSettings",
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
    "Table",
    "TabularSettings",
    "UserDataOptions",
    "Wine",
    "available",
    "data_directory",
    "fetch",
    "from_arrays",
    "from_avalanche",
    "from_continuum",
    "from_datamodules",
    "from_datasets",
    "from_huggingface",
    "from_prepared",
    "image_folder",
    "load",
    "load_table",
    "markov_chains",
    "permute",
    "rotate",
    "split",
    "tabular",
]
