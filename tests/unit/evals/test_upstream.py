"""Precision@1 as the paper computes it, and padding that measures nothing and takes nothing."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softmoe_train.data.batch import Batch, Cursor
from softmoe_train.evals import upstream
from softmoe_train.evals.upstream import (
    BINS,
    UpstreamConfig,
    UpstreamEvaluator,
    calibration_error,
    confidence,
    hits,
    in_bins,
)
from softmoe_train.model.init import initialize
from softmoe_train.model.vit import build_model
from tests.models import moe_config
from tests.ranks.small import global_batch, model_config, perturb

LOGITS = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.5, 0.7]])


def test_a_class_number_is_hit_by_the_likeliest_class() -> None:
    assert hits(LOGITS, torch.tensor([1, 1, 2])).tolist() == [True, False, True]


def test_any_of_an_image_s_labels_is_a_hit() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert hits(LOGITS, labels).tolist() == [True, False, False]


def test_any_of_the_five_likeliest_is_a_hit_among_five_and_equal_ones_come_in_order() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [0.0, 0, 0, 0, 0, 0]])
    assert hits(logits.repeat(2, 1), torch.tensor([4, 4, 5, 5]), among=5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_calibration_is_the_distance_of_confidence_from_what_is_right_bin_by_bin(loss: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(200, 7, generator=generator)
    right = torch.rand(200, generator=generator) < 0.4
    mask = torch.arange(200) < 190
    logits[195] = torch.nan  # padding
    sums = in_bins(confidence(logits[:90], loss), right[:90], mask[:90])
    sums += in_bins(confidence(logits[90:], loss), right[90:], mask[90:])
    values = np.exp(logits[:190].double().numpy())
    best = values.max(1)
    said = best / values.sum(1) if loss == "softmax" else best / (1 + best)
    edges, expected = np.linspace(0, 1, BINS + 1), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (said > low) & (said <= high)
        if inside.any():
            expected += abs(said[inside].mean() - right[:190].numpy()[inside].mean()) * inside.sum() / 190
    assert expected > 0.05
    assert calibration_error(sums) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_padding_takes_no_capacity_from_the_images_of_its_group(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "sum_over_world", lambda sums: sums)
    sparse = {"group_images": 4, "capacity_factor": 0.5}
    moe = moe_config(blocks="last 2", router=router, num_experts=8, expert_init="independent", sparse=sparse)
    model = build_model(model_config(moe=moe), torch.float32).to_empty(device="cpu")
    initialize(model, 3)
    perturb(model)
    state: Any = SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu"), module=model))
    real = torch.tensor([True] * 6 + [False] * 2)
    small = global_batch()

    def measured(padding: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        images = torch.where(real.view(-1, 1, 1, 1), small.images[:8], padding)
        batch = Batch(images, small.labels[:8], mask, torch.arange(8), Cursor(8), ())
        config = UpstreamConfig(every=0, batch_size=8, sets={})
        return dict(UpstreamEvaluator(config, {"test": [batch]}, "softmax", 10).run(state))

    black, noisy = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), small.images[8:]
    assert measured(black, real) == measured(noisy, real)
    everyone = torch.ones(8, dtype=torch.bool)
    assert measured(black, everyone)["test/loss"] != measured(noisy, everyone)["test/loss"]
