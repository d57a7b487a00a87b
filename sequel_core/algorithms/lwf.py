"""Learning without forgetting, LwF (Li & Hoiem 2016), and LwF.MC (Rebuffi et al. 2017): their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting
from sequel_core.stream.benchmark import StreamSpec

Distillation = Literal["softmax", "sigmoid", "distance"]


@dataclass(frozen=True)
class LwFHParams(AlgorithmHParams):
    """Settings of LwF (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282).

        L = CE(f(x), y) - lwf_lambda * mean_n sum_c q_nc log p_nc
        p = softmax(f(x) / T), q = softmax(f_old(x) / T), over the classes of past tasks

    f_old is the network at the end of the previous task. In the task scenario the sum is over the classes of
    each past task, each with its own softmax. The paper first trains new outputs alone; this warm-up is left
    out.

    Example:
        >>> from sequel_core import LwFHParams
        >>> LwFHParams(lwf_lambda=0.5, temperature=1).temperature
        1.0
    """

    name: ClassVar[str] = "lwf"

    distillation: Literal["auto", "softmax", "sigmoid", "distance"] = setting(
        "auto",
        "how outputs are kept close to those of the previous network: `softmax`, by cross-entropy; "
        "`sigmoid`, LwF.MC, by binary cross-entropy, which replaces the objective; `distance`, by "
        "||f(x) - f_old(x)||^2 for any objective; `auto`, softmax for class labels, else distance",
    )
    lwf_lambda: float = setting(
        1.0,
        "weight of the distillation loss",
        ge=0,
        only=("distillation", "auto", "softmax", "distance"),
    )
    temperature: float = setting(
        2.0, "temperature T of both softmaxes", gt=0, only=("distillation", "auto", "softmax")
    )
    old_outputs: Literal["recorded", "recomputed"] = setting(
        "recorded",
        "outputs of the previous network: `recorded`, for the samples as they are, as if recorded before the "
        "task (the paper); `recomputed`, for the augmented samples",
    )
    output: str | None = setting(
        None,
        "name, attribute or index of f in what the network returns; null for its only array, or `logits`",
        only=("distillation", "auto", "distance"),
    )

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError for sigmoid outputs if each task has all classes, or if there are no classes."""
        super().check_stream(spec)
        if self.distillation != "sigmoid":
            return
        self.check_labels(spec, "distillation=sigmoid")
        if spec.num_tasks > 1 and (spec.mask == spec.mask[0]).all():
            raise ValueError(
                "distillation=sigmoid needs past classes that the current task lacks, got tasks with equal "
                "classes (scenario=domain); use distillation=softmax, or the task or class scenario"
            )

    def resolved(self, classification: bool) -> Distillation:
        """Return `distillation`, with `auto` replaced by what fits the objective."""
        if self.distillation == "auto":
            return "softmax" if classification else "distance"
        return self.distillation
