"""Few-shot, k-NN and the probe against independent solvers: numpy and scikit-learn on the same features."""

from typing import Any

import numpy as np
import pytest
import torch

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.evals.knn import Nearest, votes
from softmoe_train.evals.probe import ProbeConfig, fit_probe
from softmoe_train.evals.ridge import EXPONENTS, best_strength, count_hits, hit, mean_ranks, solve_ridge

C = 7


def blobs(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of `count` images in C classes, on scales of their own, and classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(C, width))
    classes = np.arange(count) % C
    scale = np.exp(np.random.default_rng(98).normal(size=width))
    features = (centres[classes] + rng.normal(size=(count, width))) * scale + 3
    return features.astype(np.float32), classes


def reference(train: np.ndarray, classes: np.ndarray, test: np.ndarray, alpha: float) -> np.ndarray:
    """The scores by scikit-learn's Ridge, everything around it written again in numpy (paper.md 6.1)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-5
    rows = [np.hstack([(part - mean) / std, np.full((len(part), 1), 100.0)]) for part in (train, test)]
    targets = np.where(classes[:, None] == np.arange(C), 1.0, -1.0)
    ridge = linear_model.Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(rows[0], targets)
    return ridge.predict(rows[1])


@pytest.mark.parametrize("case", ["more images", "more features", "alike images", "constant features"])
def test_ridge_scores_are_those_of_another_solver(case: str) -> None:
    train, classes = blobs(40 if case != "more features" else 20, 12 if case != "more features" else 50)
    test, _ = blobs(33, train.shape[1], seed=1)
    if case == "alike images":
        train[7:] = train[np.arange(33) % 7]  # a singular Gram matrix
    read = slice(None)
    if case == "constant features":
        train[:, :5] = 4.0
        read = slice(5, None)  # their weights are 0, whatever test images have there
    solved = solve_ridge(torch.from_numpy(train), torch.from_numpy(classes), C)
    assert len(solved.eigenvalues) == min(len(train), train.shape[1] + 1)
    reduced = solved.reduced(torch.from_numpy(test).double())
    for exponent in (EXPONENTS[0], 0, 10, EXPONENTS[-1]):
        truth = reference(train[:, read], classes, test[:, read], 2.0**exponent)
        np.testing.assert_allclose(solved.scores(reduced, exponent).numpy(), truth, atol=1e-6, rtol=0)


def test_hits_are_counted_at_every_strength() -> None:
    (train, classes), (test, truth) = blobs(40, 12), blobs(5000, 12, seed=1)  # more than are classified together
    solved = solve_ridge(torch.from_numpy(train), torch.from_numpy(classes), C)
    counts = count_hits(solved, torch.from_numpy(test), torch.from_numpy(truth), EXPONENTS)
    right = [(reference(train, classes, test, 2.0**i).argmax(1) == truth).sum() for i in EXPONENTS]
    assert counts.tolist() == right
    assert len(set(right)) > 3


def test_what_ties_goes_to_the_lowest_class_and_what_is_not_finite_is_no_hit() -> None:
    scores = torch.tensor([[0.5, 0.5 + 1e-13, 0.1], [float("nan"), 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    for label, expected in ((0, [True, False, False]), (1, [False, False, True])):
        assert hit(scores, torch.full((3,), label)).tolist() == expected
    same = torch.full((2 * C, 4), 2.5)
    solved = solve_ridge(same, torch.arange(2 * C) % C, C)
    assert count_hits(solved, same[:C], torch.arange(C), EXPONENTS).tolist() == [1] * len(EXPONENTS)


def test_the_strength_has_the_best_mean_rank_over_sets_not_the_best_mean() -> None:
    accuracies = torch.tensor([[0.1, 0.2, 0.9], [0.5, 0.6, 0.4], [0.5, 0.6, 0.4]])
    assert accuracies.mean(0).argmax() == 2
    assert mean_ranks(accuracies).tolist() == pytest.approx([2 / 3, 5 / 3, 2 / 3])
    assert best_strength(accuracies) == 1
    assert mean_ranks(torch.tensor([[0.3, 0.3, 0.1]])).tolist() == [1.5, 1.5, 0.0]
    assert best_strength(torch.tensor([[0.3, 0.3, 0.1]])) == 1, "of equal ones the strongest"


@pytest.mark.parametrize("block", [1, 13, 100])
@pytest.mark.parametrize("temperature", [0.07, None])
def test_neighbours_and_votes_are_those_of_a_plain_search(block: int, temperature: float | None) -> None:
    train, classes = blobs(100, 6)
    train[50:60] = train[0]  # equally near: the lower number is nearer
    test, _ = blobs(21, 6, seed=1)
    nearest = Nearest(torch.from_numpy(test), k=9)
    for numbers in torch.arange(100).split(block):
        nearest.meet(torch.from_numpy(train)[numbers], numbers)
    similarity, numbers = nearest.found
    units = [
        part.astype(np.float64) / np.linalg.norm(part.astype(np.float64), axis=1)[:, None] for part in (test, train)
    ]
    products = units[0] @ units[1].T
    truth = np.argsort(-products.round(9), axis=1, kind="stable")[:, :9]
    assert numbers.tolist() == truth.tolist()
    np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(products, truth, 1), atol=1e-9)
    expected = np.zeros((21, C))
    for row, near in enumerate(truth):
        for one in near:
            weight = 1.0 if temperature is None else np.exp(products[row, one] / temperature)
            expected[row, classes[one]] += weight
    found = votes(similarity, torch.from_numpy(classes)[numbers], C, temperature).numpy()
    np.testing.assert_allclose(found / found.sum(1)[:, None], expected / expected.sum(1)[:, None], atol=1e-6)


def probe_config(**changes: Any) -> ProbeConfig:
    values = load_yaml(config_folder() / "evals" / "probe.yaml")["probe"]
    read = load_yaml(config_folder() / "evals" / "_set.yaml")
    read = {**read, "cache": {**read["cache"], "max_gib": 1.0, "timeout": 1.0}}
    return ProbeConfig.model_validate({**values, "data": read, **changes})


def test_the_probe_is_the_minimum_that_another_solver_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, classes = blobs(140, 5)
    test, _ = blobs(30, 5, seed=1)
    fitted = fit_probe(torch.from_numpy(train), torch.from_numpy(classes), C, -6, probe_config(tolerance=1e-8), iter)
    assert fitted.gradient <= 1e-8
    mean, std = train.astype(np.float64).mean(0), train.astype(np.float64).std(0) + 1e-5
    other = linear_model.LogisticRegression(C=2.0**6 / len(train), tol=1e-9, max_iter=5000)
    other.fit((train - mean) / std, classes)
    ours = fitted.scores(torch.from_numpy(test)).softmax(-1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba((test - mean) / std), atol=1e-6)


def test_a_probe_that_runs_out_of_iterations_says_how_far_it_came() -> None:
    train, classes = blobs(140, 5)
    fitted = fit_probe(torch.from_numpy(train), torch.from_numpy(classes), C, -20, probe_config(iterations=10), iter)
    assert fitted.iterations <= 10
    assert fitted.gradient > 1e-4
