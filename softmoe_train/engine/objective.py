"""This file owns what is minimised: the loss of the global batch and the routers' auxiliary losses, a micro-batch at a time.

B images  L blocks with experts  M measures that a router tells
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softmoe_train.data.batch import Batch
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.loss import LossKind, classification_loss
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.routing import MEASURES
from softmoe_train.model.vit import Predictions


class Objective:
    """Adds up, since the last `forget`, what this rank's micro-batches contribute to the means over the global batch."""

    def __init__(self, config: ModelConfig, loss: LossKind, global_batch: int, seed: int, device: torch.device) -> None:
        self.loss: LossKind = loss
        self.global_batch = global_batch
        self.groups = global_batch // config.group_images
        self.seed = seed
        self.minimised = torch.zeros((), device=device)
        self.told: Tensor | None = None  # "L M"; the sum over ranks is the mean over the groups of the global batch

    def of(self, forward: Callable[[Tensor, Tensor], Predictions], batch: Batch) -> tuple[Tensor, Tensor]:
        """The share of a micro-batch in the mean loss, detached, and in all that is minimised, to be differentiated."""
        predicted = forward(batch.images, image_keys(self.seed, batch.sample_ids))
        loss = classification_loss(predicted.logits, batch.labels, self.loss).sum() / self.global_batch
        objective = loss
        if predicted.told is not None:
            told = predicted.told / self.groups
            objective = loss + told[:, MEASURES.index("auxiliary_loss")].sum()
            self.told = told.detach() if self.told is None else self.told + told.detach()
        self.minimised += objective.detach()
        return loss.detach(), objective

    def forget(self) -> None:
        """Begin a new global batch."""
        self.minimised.zero_()
        self.told = None
