"""Precision@1 as the paper computes it."""

import torch

from softmoe_train.evals.upstream import hits

LOGITS = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.5, 0.7]])


def test_a_class_number_is_hit_by_the_likeliest_class() -> None:
    assert hits(LOGITS, torch.tensor([1, 1, 2])).tolist() == [True, False, True]


def test_any_of_an_image_s_labels_is_a_hit() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert hits(LOGITS, labels).tolist() == [True, False, False]
