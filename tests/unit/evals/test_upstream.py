"""Precision@1 as the paper computes it, and padding that measures nothing and takes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softmoe_train.data.batch import Batch, Cursor
from softmoe_train.evals import upstream
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator, hits
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
        return dict(UpstreamEvaluator(UpstreamConfig(every=0, batch_size=8), [batch], "softmax").run(state))

    black, noisy = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), small.images[8:]
    assert measured(black, real) == measured(noisy, real)
    everyone = torch.ones(8, dtype=torch.bool)
    assert measured(black, everyone)["test/loss"] != measured(noisy, everyone)["test/loss"]
