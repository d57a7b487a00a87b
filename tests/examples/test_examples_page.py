"""The scripts of docs/guides/examples.md."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import sequel_lightning  # noqa: F401  lets a script import torchvision beside any PyTorch build
from sequel_core import load_result
from sequel_core.cli import main
from tests.pages import ROOT, code_blocks, commands, run_block

PAGE = ROOT / "docs" / "guides" / "examples.md"
BERT, TABLE, CHAIN = code_blocks(PAGE, "python")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of transformers, and Lightning's advice on speed
def test_ewc_on_a_hugging_face_model() -> None:
    pytest.importorskip("transformers")
    names = run_block(PAGE, BERT)
    model, ewc = names["model"], names["ewc"]
    assert ewc.tasks == 2
    assert ewc.importance.keys() == dict(model.named_parameters()).keys()
    for tree in (ewc.importance, ewc.anchor):
        assert all(torch.isfinite(tensor).all() for tensor in tree.values())
    assert ewc.importance["bert.classifier.weight"].min() > 0
    rare = ewc.importance["bert.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(rare[60:], torch.zeros_like(rare[60:]))  # words of neither task


def test_er_on_a_table(tmp_path: Path) -> None:
    """The two frameworks and the command line have the same squared errors."""
    names = run_block(PAGE, TABLE)
    results: list[Any] = [names["pytorch"], names["jax"]]
    lines = commands(PAGE)
    for k, line in enumerate(lines):
        assert main([*shlex.split(line)[1:], "-q", f"run_dir={tmp_path / str(k)}"]) == 0
        results.append(load_result(tmp_path / str(k)))
    assert [result.config["mode"] for result in results] == ["pytorch", "jax", "pytorch", "jax"]
    assert results[0].score.name == "squared error"
    for result in results[1:]:
        np.testing.assert_allclose(result.matrix, results[0].matrix, rtol=1e-5)
    assert results[0].matrix[2, 0] < results[0].matrix[0, 0] < 0.6  # 1 is the mean of the targets


def test_ewc_in_an_optax_chain() -> None:
    names = run_block(PAGE, CHAIN)
    penalty = names["optimizer"].opt_state[0]
    assert [leaf.shape for leaf in jax.tree.leaves(penalty.importance)] == [(16,), (4, 16)]  # not the head
    x, y = (np.concatenate([np.asarray(b[k], np.float64) for b in names["batches"](2)]) for k in "xy")
    w, b, v, c = (np.asarray(p, np.float64) for p in parameters(names["params"]))
    hidden = np.maximum(x @ w + b, 0)
    logits = hidden @ v + c
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y.astype(int)]
    backward = (error @ v.T) * (hidden > 0)
    fisher = names["fisher"]["hidden"]
    np.testing.assert_allclose(fisher["bias"][...], (backward**2).mean(0), rtol=1e-3, atol=1e-7)
    expected = (x**2).T @ backward**2 / len(x)
    np.testing.assert_allclose(fisher["kernel"][...], expected, rtol=1e-3, atol=1e-7)


def parameters(params: Any) -> list[Any]:
    return [params[layer][part][...] for layer in ("hidden", "head") for part in ("kernel", "bias")]
