"""Experience replay with asymmetric cross-entropy (Caccia et al. 2022, https://arxiv.org/abs/2104.05025).

    L = L_in(B_n; classes of B_n) + L_re(B_M; all classes)

B_n is the batch and B_M a draw from the memory, from the first task on. Each has its own pass and mean loss.
The logits of L_in are masked to the classes of the samples of the batch, so the rows of the last layer for
other classes get no gradient from it. The batch is then written to the memory, as in ER.

The official code has a last layer of cosines, the setting `backbone.classifier=cosine`, and does not mask
classes that it has not seen, `classes="unseen"`. It compares labels with the largest one seen so far; here,
the tasks say which classes are seen.

Mirror: sequel_flax/algorithms/er_ace.py
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_lightning.objectives import Objective, check_classification
from sequel_lightning.replay import Outputs, ReplayBatch, ReplayModule, mean_loss


def replay_loss(batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
    """Return the mean loss of the batch plus that of the draw, shape ()."""
    return mean_loss(batch) + mean_loss(*draws)


def batch_classes(y: Tensor, seen: Tensor, hparams: ERACEHParams) -> Tensor:
    """Return the classes that the loss of a batch is over, bool `[num_classes]`.

    `y` are the labels of the batch `[B]`, `seen` the classes of the tasks so far, bool `[num_classes]`.
    """
    present = F.one_hot(y.long(), len(seen)).bool().any(0)
    return present | ~seen if hparams.classes == "unseen" else present


class ERACE(ReplayModule):
    """ER-ACE; see `help(ERACEHParams)` for its settings.

    Raises:
        ValueError: the targets are not class labels; no spec, or a memory that does not fit the stream.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import ERACEHParams
        >>> from sequel_lightning import MLP, ERACE
        >>> digits = SplitDigits(num_tasks=5, scenario="class")
        >>> net = MLP(image_shape=digits.image_shape, classifier="cosine")
        >>> module = ERACE(net, torch.optim.SGD, ERACEHParams(mem_size=20), digits.spec)
        >>> module.memory_bytes()  # 20 images, labels and task indices
        1440
    """

    hparams_class = ERACEHParams
    algorithm_hparams: ERACEHParams

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError unless the objective is for class labels."""
        super().check_objective(objective)
        check_classification(objective, self.algorithm_hparams.name)

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        return replay_loss(batch, draws)

    def chosen(self, samples: list[ReplayBatch]) -> list[ReplayBatch]:
        """Return the samples, with the classes that the loss of the batch is over."""
        kept = batch_classes(samples[0].y, self.seen_classes(), self.algorithm_hparams)
        return [samples[0]._replace(classes=kept), *samples[1:]]
