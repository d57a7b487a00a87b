"""The streams of Markov chains, compared with chains that are stepped one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sequel_benchmarks import MarkovChains
from sequel_benchmarks.tokens import transition_matrix
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, IntArray


def everything(split: Any) -> tuple[IntArray, IntArray, IntArray]:
    """Return the tokens, the attention mask and the targets of all samples."""
    x, y, _ = split.take(np.arange(len(split)))
    return x["input_ids"], x["attention_mask"], y


def chain(matrix: FloatArray, uniforms: FloatArray) -> list[int]:
    """Return the tokens of one sequence: token b follows a if u lies in the b-th interval of row a."""
    tokens = [int(uniforms[0] * len(matrix))]
    for u in uniforms[1:]:
        total, token = 0.0, -1
        while total <= u and token < len(matrix) - 1:
            token += 1
            total += matrix[tokens[-1], token]
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("predict", ["next_token", "chain"])
def test_sequences_are_those_of_the_chain(predict: Any) -> None:
    stream = MarkovChains(
        num_tasks=2, predict=predict, length=9, min_length=4, train_samples=6, test_samples=4, seed=3
    )
    for task in stream.tasks:
        for part, split in (("train", task.train), ("test", task.test)):
            tokens, mask, y = everything(split)
            count = len(tokens)
            key: Any = (3, "markov tokens", task.index, part)
            uniforms = plan.uniform(*key, count=count * 10).reshape(count, 10)
            lengths = 4 + np.floor(plan.uniform(*key, "lengths", count=count) * 6).astype(int)
            for row in range(count):
                label = row % 2 if predict == "chain" else 0
                expected = chain(transition_matrix(3, task.index, label, 8), uniforms[row])
                padding = 9 - lengths[row]
                assert tokens[row].tolist() == expected[: lengths[row]] + [0] * padding
                assert mask[row].tolist() == [1] * lengths[row] + [0] * padding
                following = expected[1 : lengths[row] + 1] + [-100] * padding
                assert y[row].tolist() == (label if predict == "chain" else following)
    assert stream.num_classes == (2 if predict == "chain" else 8)
    assert stream.scenario == "domain"


def test_transition_matrices_are_uniform_on_the_simplex() -> None:
    """The entries of a flat Dirichlet distribution over V values have variance (V - 1) / V^2 / (V + 1)."""
    matrix = transition_matrix(0, 0, 0, 200)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    assert (matrix > 0).all()
    assert matrix.var() == pytest.approx(199 / 200**2 / 201, rel=0.05)
    assert np.abs(matrix - transition_matrix(0, 1, 0, 200)).max() > 1e-3
    assert np.abs(matrix - transition_matrix(0, 0, 1, 200)).max() > 1e-3
    assert np.abs(matrix - transition_matrix(1, 0, 0, 200)).max() > 1e-3


def test_frequencies_are_the_transition_probabilities() -> None:
    stream = MarkovChains(num_tasks=1, num_tokens=4, length=50, min_length=50, train_samples=4000)
    tokens, mask, y = everything(stream.tasks[0].train)
    assert mask.all()
    counts = np.zeros((4, 4))
    np.add.at(counts, (tokens.ravel(), y.ravel()), 1)
    p = transition_matrix(0, 0, 0, 4)
    deviation = np.sqrt(p * (1 - p) / counts.sum(1, keepdims=True))
    assert (np.abs(counts / counts.sum(1, keepdims=True) - p) < 4.5 * deviation).all()


@pytest.mark.parametrize(("scenario", "first"), [("domain", 0), ("task", 3), ("class", 3)])
def test_labels_of_the_scenarios(scenario: Any, first: int) -> None:
    stream = MarkovChains(num_tasks=2, predict="chain", chains_per_task=3, scenario=scenario)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2), tuple(range(first, first + 3))]
    assert stream.num_classes == 3 + first
    assert [task.name for task in stream.tasks] == ["chains 0 to 2", "chains 3 to 5"]
    labels = everything(stream.tasks[1].test)[2]
    np.testing.assert_array_equal(labels, first + np.arange(200) % 3)


def test_subset_and_validation_are_disjoint_training_samples() -> None:
    stream = MarkovChains(num_tasks=2, train_samples=100, test_samples=10, subset=30, validation=0.2)
    whole = MarkovChains(num_tasks=2, train_samples=100, test_samples=10)
    for task, complete in zip(stream.tasks, whole.tasks, strict=True):
        train, held_out, every = (
            {tuple(row) for row in everything(split)[0].tolist()}
            for split in (task.train, task.validation, complete.train)
        )
        assert (len(task.train), len(task.validation), len(task.test)) == (30, 20, 10)
        assert train | held_out <= every
        assert not train & held_out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_length": 33}, r"min_length must be <= length, got min_length=33 with length=32"),
        (
            {"scenario": "class"},
            r"scenario must be domain with predict=next_token, got class; use predict=chain",
        ),
        ({"predict": "token"}, r"predict must be one of next_token, chain, got 'token'"),
        ({"num_tokens": 1}, r"num_tokens must be >= 2"),
        ({"chains_per_task": 3}, r"chains_per_task is only used with predict=chain"),
        (
            {"predict": "chain", "test_samples": 1},
            r"test_samples must be >= chains_per_task, got 1 with chains_per_task=2",
        ),
    ],
)
def test_settings_that_do_not_fit(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MarkovChains(**options)
