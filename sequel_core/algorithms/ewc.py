"""Elastic weight consolidation, EWC (Kirkpatrick et al. 2017): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class EWCHParams(AlgorithmHParams):
    """Settings of EWC (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796).

        L = CE(f(x), y) + lambda/2 * sum_k sum_i F_{k,i} (theta_i - theta*_{k,i})^2

    F_k is the diagonal Fisher information of past task k, estimated at its final weights theta*_k. `fisher`
    says how (van de Ven 2025, https://arxiv.org/abs/2502.11756, compares the first three and `batch`):

    - `empirical`: 1/N sum_n (d nll(y_n | x_n))^2 with the targets y_n of the data, as in most code.
    - `sampled`: the same with targets that are drawn from the model (Kunstner, Balles & Hennig 2019,
      https://arxiv.org/abs/1905.12558).
    - `exact`: the expectation over all targets of the model, for classes and for squared errors (Kirkpatrick
      et al. 2017 define it so).
    - `batch`: the squared gradient of the mean over each batch, averaged over the batches (the code of
      Avalanche, Lomonaco et al. 2021, https://arxiv.org/abs/2104.00405).
    - `mean`: the squared gradient of the mean over all `fisher_samples` samples. The code of GEM (Lopez-Paz &
      Ranzato 2017, https://arxiv.org/abs/1706.08840) does this, and that of MER, from which the EWC of the
      La-MAML paper comes.
    - `weighted`: `empirical` with the weight p(y_n | x_n) for each sample (the code of the DER paper, Buzzega
      et al. 2020, https://arxiv.org/abs/2004.07211).

    Example:
        >>> from sequel_core import EWCHParams
        >>> EWCHParams(ewc_lambda=10, accumulation="online", gamma=0.9).ewc_lambda
        10.0
        >>> EWCHParams(ewc_lambda=-1)
        Traceback (most recent call last):
        ValueError: ewc_lambda must be >= 0, got -1.0
    """

    name: ClassVar[str] = "ewc"

    ewc_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda/2 * sum F (theta - theta*)^2", ge=0
    )
    accumulation: Literal["separate", "online"] = setting(
        "separate",
        "how past tasks are combined: `separate`, the sum of one penalty per task (stored exactly as a "
        "single one); `online`, one penalty around the latest weights, with past importances decayed by "
        "gamma",
    )
    gamma: float = setting(
        1.0, "decay of past importances at the end of a task", ge=0, le=1, only=("accumulation", "online")
    )
    fisher: Literal["empirical", "sampled", "exact", "batch", "mean", "weighted"] = setting(
        "empirical",
        "targets of the Fisher estimate: `empirical`, those of the data; `sampled`, drawn from the model; "
        "`exact`, the expectation over all targets; `batch`, those of the data, with one gradient per batch; "
        "`mean`, with one gradient for all samples; `weighted`, those of the data, weighted by their "
        "probability",
    )
    fisher_samples: int | None = setting(
        1024, "number of training samples for the Fisher estimate of a task; null for all", ge=1
    )
