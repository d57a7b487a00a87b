"""Tabular data sets that come with scikit-learn, as arrays.

A fixed fifth of the samples (of each class, if there are classes) is the test set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel_core.settings import check_name
from sequel_core.stream import plan

TABLES: dict[str, str] = {
    "wine": "3 cultivars of wine, 142 + 36 samples of 13 features (bundled with scikit-learn)",
    "breastcancer": "malignant or benign tumours, 456 + 113 samples of 30 features (bundled with "
    "scikit-learn)",
    "diabetes": "progression of a disease, a number; 354 + 88 samples of 10 features (bundled with "
    "scikit-learn)",
}
"""The data sets that `load_table` accepts, each with a description."""


@dataclass(frozen=True, eq=False)
class Table:
    """A tabular data set. Streams of tasks are made from it by `tabular`.

    Args:
        name: a short word that becomes the name of the benchmark.
        train_x: numbers `[N, D]`, one column per feature.
        train_y: `[N]`; labels in 0 to num_classes - 1, or the values of a regression.
        test_x: numbers `[M, D]`.
        test_y: as train_y, `[M]`.
        feature_names: name of each feature, D of them.
        class_names: name of each class; None for a regression.

    Raises:
        ValueError: an array has the wrong shape, there is not one name per feature, or a label is out of
            range.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import Table
        >>> x, y = np.zeros((6, 2)), np.arange(6) % 3
        >>> Table("mine", x, y, x, y, ("age", "dose"), ("a", "b", "c")).num_classes
        3
    """

    name: str
    train_x: NDArray[Any]
    train_y: NDArray[Any]
    test_x: NDArray[Any]
    test_y: NDArray[Any]
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.feature_names)
        for part in ("train", "test"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if x.ndim != 2 or x.shape[1] != count or y.shape != x.shape[:1]:
                raise ValueError(
                    f"{self.name}: {part}_x and {part}_y must be [N, {count}] and [N] with {count} feature "
                    f"names, got {list(x.shape)} and {list(y.shape)}"
                )
            if self.class_names is None:
                continue
            if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= len(self.class_names):
                raise ValueError(
                    f"{self.name}: {part}_y must be labels 0..{len(self.class_names) - 1}, one for each "
                    f"class name, got {y.dtype} from {y.min()} to {y.max()}; leave class_names out for a "
                    "regression"
                )

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for a regression."""
        return None if self.class_names is None else len(self.class_names)


def load_table(name: str) -> Table:
    """Return a tabular data set that comes with scikit-learn. Its values are not standardised.

    Args:
        name: one of `TABLES`.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> from sequel_benchmarks import load_table
        >>> table = load_table("diabetes")
        >>> table.train_x.shape, table.test_x.shape, table.feature_names[2]
        ((354, 10), (88, 10), 'bmi')
    """
    check_name("table", name, TABLES)
    return _table(name)


@cache
def _table(name: str) -> Table:
    from sklearn import datasets  # imported here because it takes a second

    loaders: dict[str, Callable[[], Any]] = {
        "wine": datasets.load_wine,
        "breastcancer": datasets.load_breast_cancer,
        "diabetes": lambda: datasets.load_diabetes(scaled=False),
    }
    bunch = loaders[name]()
    classes = getattr(bunch, "target_names", None)
    x, y = bunch.data.astype(np.float64), bunch.target.astype(np.float64 if classes is None else np.int64)
    is_test = np.zeros(len(y), np.bool_)
    groups = [y == c for c in range(len(classes))] if classes is not None else [np.ones(len(y), np.bool_)]
    for k, group in enumerate(groups):
        rows = np.flatnonzero(group)
        order = plan.permutation(name, "test", k, count=len(rows))
        is_test[rows[order[: round(len(rows) / 5)]]] = True
    arrays = (x[~is_test], y[~is_test], x[is_test], y[is_test])
    for array in arrays:
        array.flags.writeable = False  # all streams share these arrays
    features = tuple(str(feature).replace(" ", "_") for feature in bunch.feature_names)
    return Table(name, *arrays, features, None if classes is None else tuple(map(str, classes)))
