"""Methods as callbacks, for a LightningModule that you already have, unchanged.

    keep = attach.EWC(strength=10.0)
    for loader in tasks:
        trainer = Trainer(max_epochs=5, callbacks=[keep])
        trainer.fit(module, loader)                 # one fit is one task; keep is consolidated when it ends

The module keeps its own `training_step`, loss, optimizers and batches. Replay methods also need a loader
that adds the samples of the memory:

    keep = attach.ER(mem_size=500, mem_batch_size=10)
    ...
        trainer.fit(module, attach.with_replay(loader, keep))

Gradients, in the order of a step:

1. For each batch, LFL, DER and DER++ add the gradients of their losses after that of `training_step`. The
   losses are scaled and divided as Lightning does with the loss of `training_step`, for gradient scaling and
   accumulation, and computed under the same autocast.
2. Once per optimizer step, after accumulation and unscaling and before clipping: A-GEM projects the gradient;
   SI stores it for its path integral; EWC, MAS and SI add the gradient of the penalty. Several callbacks do
   so in the order of the Trainer's list.

With strategy `ddp`, the gradients of step 1 are means over the processes, as that of `training_step` is, and
step 2 is the same in all processes.
"""

from __future__ import annotations

from sequel_lightning.attach.attached import Attached
from sequel_lightning.attach.data import with_replay
from sequel_lightning.attach.lfl import LFL
from sequel_lightning.attach.penalties import EWC, MAS, SI
from sequel_lightning.attach.replay import AGEM, DER, ER, DERpp

__all__ = ["AGEM", "DER", "ER", "EWC", "LFL", "MAS", "SI", "Attached", "DERpp", "with_replay"]

NOT_ATTACHED = {
    "Naive": "it is training without a callback",
    "Joint": "it trains on all tasks at once; give the Trainer a loader of torch's ConcatDataset",
    "StableSGD": "it is a choice of dropout and learning rates; set them in your module",
    "ERACE": "it masks logits within the loss of your module; use sequel_lightning.ERACE",
    "BiC": "it corrects the predictions of your module after each task; use sequel_lightning.BiC",
    "GDumb": "it trains the network anew after each task; use sequel_lightning.GDumb",
    "GEM": "it draws from each past task, which with_replay cannot; use attach.AGEM or sequel_lightning.GEM",
    "ICaRL": "it replaces the head of the network by class means; use sequel_lightning.ICaRL",
    "KCL": "it replaces the head of the network by a kernel; use sequel_lightning.KCL",
    "LaMAML": "it takes inner steps that replace the optimizer's; use sequel_lightning.LaMAML",
    "LwF": "it needs the classes of past tasks; use sequel_lightning.LwF",
    "MIR": "it chooses the replayed samples by their losses; use sequel_lightning.MIR",
    "MCSGD": "it trains further weights after each task; use sequel_lightning.MCSGD",
}
"""The methods that are no callbacks, and why."""


def __getattr__(name: str) -> object:
    """Raise AttributeError; for a method that cannot be attached, with the reason."""
    if name in NOT_ATTACHED:
        raise AttributeError(f"{name} cannot be attached to your own module: {NOT_ATTACHED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
