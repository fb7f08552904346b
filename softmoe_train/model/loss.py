"""This file owns the training losses.

B images  C classes
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LossKind = Literal["softmax", "sigmoid"]


def classification_loss(
    logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"] | Float[Tensor, "B C"], kind: LossKind
) -> Float[Tensor, " B"]:
    """The loss of each image in float32, for class numbers or for multi-hot (or soft) labels.

    softmax: -sum_c label_c · log softmax(logits)_c, the labels of an image scaled to sum to one, so that an image with many
    labels weighs no more than others. sigmoid: binary cross-entropy summed over classes (the paper's).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = one_hot(labels, logits.shape[-1]).to(logits.dtype)
    if kind == "softmax":
        share = targets / targets.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        return -(share * logits.log_softmax(dim=-1)).sum(dim=-1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)


def one_hot(labels: Int[Tensor, " B"] | Float[Tensor, "B C"], num_classes: int) -> Tensor:
    """Labels as a B x C matrix: class numbers are expanded, multi-hot labels pass unchanged."""
    return F.one_hot(labels, num_classes) if labels.ndim == 1 else labels
