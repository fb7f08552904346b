"""The losses against their formulas."""

import torch
import torch.nn.functional as F

from softmoe_train.model.loss import classification_loss

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])


def test_softmax_loss_of_class_numbers_is_cross_entropy() -> None:
    labels = torch.tensor([2, 1])
    want = F.cross_entropy(LOGITS, labels, reduction="none")
    torch.testing.assert_close(classification_loss(LOGITS, labels, "softmax"), want)


def test_sigmoid_loss_sums_over_classes() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    want = (torch.log1p(LOGITS.exp()) - labels * LOGITS).sum(-1)
    torch.testing.assert_close(classification_loss(LOGITS, labels, "sigmoid"), want)


def test_class_numbers_and_one_hot_rows_give_the_same_loss() -> None:
    labels = torch.tensor([2, 1])
    rows = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    for kind in ("softmax", "sigmoid"):
        assert torch.equal(classification_loss(LOGITS, labels, kind), classification_loss(LOGITS, rows, kind))


def test_soft_labels_weigh_the_softmax_loss() -> None:
    labels = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(
        classification_loss(LOGITS, labels, "softmax"), F.cross_entropy(LOGITS, labels, reduction="none")
    )


def test_the_loss_of_mixed_labels_is_the_mean_of_both_by_their_weights() -> None:
    first, second, weight = torch.tensor([2, 1]), torch.tensor([0, 1]), torch.tensor([0.75, 0.625])
    rows = weight[:, None] * F.one_hot(first, 3) + (1 - weight)[:, None] * F.one_hot(second, 3)
    for kind in ("softmax", "sigmoid"):
        want = weight * classification_loss(LOGITS, first, kind) + (1 - weight) * classification_loss(
            LOGITS, second, kind
        )
        torch.testing.assert_close(classification_loss(LOGITS, rows, kind), want)


def test_half_precision_logits_give_a_float32_loss() -> None:
    loss = classification_loss(LOGITS.bfloat16(), torch.tensor([2, 1]), "sigmoid")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, classification_loss(LOGITS.bfloat16().float(), torch.tensor([2, 1]), "sigmoid"))
