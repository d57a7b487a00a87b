"""EWC and ER attached to a Hugging Face BERT with random weights: under a full Trainer, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from sequel_core.stream.plan import uniform
from sequel_lightning import attach

transformers: Any = pytest.importorskip("transformers")
SAMPLES, BATCH, DRAWN, SLOTS, EPOCHS, ACCUMULATED, CLIP = 24, 4, 3, 10, 2, 2, 0.5
STRENGTH, FISHER_SAMPLES, LEARNING_RATE = 50.0, 10, 5e-3


class TextClassifier(pl.LightningModule):
    """A user's module around the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert()

    def training_step(self, batch: dict[str, Tensor]) -> Any:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = optimizers(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def optimizers(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def texts(task: int) -> list[tuple[list[int], int]]:
    """Return sentences of 3 to 9 tokens; the label depends on the first token and on the task."""
    rng = np.random.default_rng(task)
    sentences = [rng.integers(1, 30, rng.integers(3, 10)).tolist() for _ in range(SAMPLES)]
    return [(tokens, (tokens[0] + task) % 3) for tokens in sentences]


def collate(samples: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Pad to the longest sentence of the batch."""
    width = max(len(tokens) for tokens, _ in samples)
    ids = [tokens + [0] * (width - len(tokens)) for tokens, _ in samples]
    mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in samples]
    labels = [label for _, label in samples]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def loader(task: int, shuffle: bool = False) -> DataLoader[Any]:
    data: Any = texts(task)
    return DataLoader(data, BATCH, shuffle=shuffle, collate_fn=collate)


def trainer(callbacks: list[Any], precision: Any) -> pl.Trainer:
    """Early stopping ends the training after two of five epochs: no loss falls by 10."""
    stopping = EarlyStopping("val_loss", min_delta=10.0, patience=1)
    return pl.Trainer(
        max_epochs=5, precision=precision, accumulate_grad_batches=ACCUMULATED, gradient_clip_val=CLIP,
        callbacks=[*callbacks, stopping], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip


def strategies() -> tuple[attach.EWC, attach.ER]:
    penalty = attach.EWC(STRENGTH, samples=FISHER_SAMPLES)
    return penalty, attach.ER(mem_size=SLOTS, mem_batch_size=DRAWN)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_it_runs_in_half_precision_and_resumes_in_the_middle_of_a_task(tmp_path: Path) -> None:
    def run(path: Path | None) -> dict[str, Any]:
        torch.manual_seed(1)
        module, (penalty, replay) = TextClassifier(), strategies()
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        if path is None:
            data = attach.with_replay(loader(0, shuffle=True), replay)
            trainer([penalty, replay], "bf16-mixed").fit(module, data, loader(0))
            data = attach.with_replay(loader(1, shuffle=True), replay)
            trainer([penalty, replay, saver], "bf16-mixed").fit(module, data, loader(1))
        else:
            data = attach.with_replay(loader(1, shuffle=True), replay, past=[loader(0)])
            last = trainer([penalty, replay, saver], "bf16-mixed")
            last.fit(module, data, loader(1), ckpt_path=str(path), weights_only=True)
            assert last.current_epoch == EPOCHS
        assert penalty.tasks == replay.tasks == 2
        assert {row and row[0] for row in replay.rows} == {0, 1}
        return {**module.state_dict(), **{f"importance {k}": v for k, v in penalty.importance.items()}}

    straight, resumed = run(None), run(tmp_path / "step=2.ckpt")
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())
    assert all(bool(value.isfinite().all()) for value in straight.values())


def test_in_float64_it_equals_a_loop_by_hand() -> None:
    module, (penalty, replay) = TextClassifier(), strategies()
    for task in range(2):
        data = attach.with_replay(loader(task), replay)
        trainer([penalty, replay], "64-true").fit(module, data, loader(task))
    expected = by_hand()
    for name, p in module.model.named_parameters():
        size = max(
            expected[name].norm(), torch.tensor(1e-3)
        )  # biases of keys have only gradients of rounding
        assert torch.dist(p, expected[name]) < 1e-10 * size, name
    assert max(float(value.max()) for value in penalty.importance.values()) > 1e-3


def by_hand() -> dict[str, Tensor]:
    """ER and EWC in a plain loop, with the random numbers of the plan."""
    model = bert().double()
    params = dict(model.named_parameters())
    anchor = {name: p.detach().clone() for name, p in params.items()}
    importance = {name: torch.zeros_like(p) for name, p in params.items()}
    data, seen, batches = [texts(task) for task in range(2)], 0, 0
    held: list[tuple[int, int]] = []
    for task in range(2):
        optimizer, scheduler = optimizers(model)
        for first in [*range(0, SAMPLES, BATCH)] * EPOCHS:
            rows = [(task, first + k) for k in range(BATCH)]
            u = uniform(0, "memory reads", start=DRAWN * batches, count=DRAWN)
            draw = [held[slot] for slot in floyd(u, len(held))]
            batch = collate([data[t][row] for t, row in rows + draw])
            (model(**batch).loss / ACCUMULATED).backward()
            for row, x in zip(rows, uniform(0, "memory writes", start=seen, count=BATCH), strict=True):
                seen += 1
                if seen <= SLOTS:
                    held.append(row)
                elif int(x * seen) < SLOTS:
                    held[int(x * seen)] = row
            batches += 1
            if batches % ACCUMULATED == 0:
                for name, p in params.items():
                    p.grad = p.grad + STRENGTH * importance[name] * (p.detach() - anchor[name])
                torch.nn.utils.clip_grad_norm_(list(params.values()), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        model.eval()
        for k in range(FISHER_SAMPLES):
            first = k - k % BATCH
            batch = collate(data[task][first : first + BATCH])
            model(**{name: part[k % BATCH][None] for name, part in batch.items()}).loss.backward()
            for name, p in params.items():
                importance[name] += p.grad.square() / FISHER_SAMPLES
            model.zero_grad()
        model.train()
        anchor = {name: p.detach().clone() for name, p in params.items()}
    return params


def floyd(u: NDArray[np.float64], population: int) -> list[int]:
    """Return a uniform random set of numbers below `population` (Bentley & Floyd 1987)."""
    chosen: set[int] = set()
    for x, top in zip(u, range(max(0, population - len(u)), population), strict=False):
        j = int(x * (top + 1))
        chosen.add(top if j in chosen else j)
    return sorted(chosen)
