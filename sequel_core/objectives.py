"""What a network is trained and scored on: the settings of an objective, and the name of its score.

The functions are in the plug-ins: `sequel_lightning.objectives` and `sequel_flax.objectives`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from sequel_core.settings import Settings, setting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.trees import LeafSpec, shapes_text, specs_text

ObjectiveType = Literal[
    "auto", "cross_entropy", "binary_cross_entropy", "squared_error", "token_cross_entropy"
]


class Score(NamedTuple):
    """The number that is measured on each task, and its direction.

    Args:
        name: lower case, words separated by spaces; `"accuracy"`, `"squared error"`.
        higher_is_better: whether a higher score is better.
        fraction: whether scores are in [0, 1]; they are then shown in percent.

    Example:
        >>> error = Score("squared error", higher_is_better=False, fraction=False)
        >>> error.key
        'squared_error'
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    fraction: bool = True

    @property
    def key(self) -> str:
        """The name in files and in the tags of loggers: words separated by underscores."""
        return self.name.replace(" ", "_")

    @property
    def title(self) -> str:
        """The name with a capital letter."""
        return self.name[:1].upper() + self.name[1:]

    def of(self, metric: str) -> str:
        """Return the name of a metric of this score: `average_accuracy` for `average_score`."""
        return metric.replace("score", self.key)


ACCURACY = Score()
"""The default: the fraction of correct predictions."""

SCORES: dict[str, Score] = {
    "cross_entropy": ACCURACY,
    "binary_cross_entropy": Score("label accuracy"),
    "squared_error": Score("squared error", higher_is_better=False, fraction=False),
    "token_cross_entropy": Score("token accuracy"),
}
"""The score of each built-in objective."""


@dataclass(frozen=True)
class ObjectiveHParams(Settings):
    """Settings of the built-in objectives.

    Example:
        >>> from sequel_core import ObjectiveHParams
        >>> ObjectiveHParams("cross_entropy", label_smoothing=0.1).label_smoothing
        0.1
    """

    type: ObjectiveType = setting(
        "auto",
        "the loss: `cross_entropy` for class labels; `binary_cross_entropy` for several labels per sample "
        "(0 or 1 each); `squared_error` for numbers; `token_cross_entropy` for one class per token; `auto` "
        "chooses by the dtype and shape of the targets",
    )
    label_smoothing: float = setting(
        0.0,
        "weight of the uniform distribution in the target",
        ge=0,
        lt=1,
        only=("type", "auto", "cross_entropy", "token_cross_entropy"),
    )
    class_weights: tuple[float, ...] | None = setting(
        None, "weight of each class in the loss; null for 1", ge=0, only=("type", "auto", "cross_entropy")
    )
    ignore_index: int = setting(
        -100, "target of tokens that do not count", only=("type", "auto", "token_cross_entropy")
    )
    reduce: Literal["auto", "samples", "weights", "tokens"] = setting(
        "auto",
        "what a mean loss is over: `samples`; `weights`, the class weights of the samples (as in torch); "
        "`tokens`, all tokens that count. `auto` is `weights` with class weights, `tokens` for "
        "token_cross_entropy, and else `samples`",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = {"weights": self.class_weights is not None, "tokens": self.type == "token_cross_entropy"}
        if not fits.get(self.reduce, True):
            needed = "class_weights" if self.reduce == "weights" else "type=token_cross_entropy"
            raise ValueError(f"reduce={self.reduce} needs {needed}; use reduce=samples, or leave it out")

    def resolved(self, spec: StreamSpec) -> ObjectiveHParams:
        """Return the settings for a stream, with a type and a reduction in place of `auto`.

        Args:
            spec: of the stream.

        Raises:
            ValueError: the objective does not fit the targets of the stream.
        """
        dtype_kind = np.dtype(spec.y.dtype).kind if isinstance(spec.y, LeafSpec) else ""
        if spec.labelled:
            fitting: ObjectiveType | None = "cross_entropy"
        elif spec.per_token:
            fitting = "token_cross_entropy"
        else:
            by_kind: dict[str, ObjectiveType] = {"f": "squared_error", "b": "binary_cross_entropy"}
            fitting = by_kind.get(dtype_kind)
        if self.type == "auto":
            if fitting is None:
                raise ValueError(
                    f"no objective is built in for targets {shapes_text(spec.y)}; give an objective with a "
                    "loss of your own"
                )
            return replace(self, type=fitting).resolved(spec)
        several_labels = not spec.labelled and dtype_kind in ("i", "u", "f")
        if self.type != fitting and not (several_labels and self.type == "binary_cross_entropy"):
            raise ValueError(
                f"objective {self.type} does not fit targets {specs_text(spec.y)}; use "
                f"{fitting or 'an objective with a loss of your own'}"
            )
        if self.class_weights is not None and len(self.class_weights) != spec.num_classes:
            raise ValueError(
                f"class_weights must have one weight per class, got {len(self.class_weights)} for "
                f"{spec.num_classes} classes"
            )
        if self.reduce != "auto":
            return self
        tokens = self.type == "token_cross_entropy"
        return replace(
            self, reduce="tokens" if tokens else "samples" if self.class_weights is None else "weights"
        )
