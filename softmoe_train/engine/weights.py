"""This file owns how the weights of a model on the meta device come to be on a device."""

from collections.abc import Callable

import torch

from softmoe_train.dist import local_offsets, local_values
from softmoe_train.model.init import LocalPart, initialize
from softmoe_train.model.vit import ViT

Materialise = Callable[[ViT, torch.device, int], None]  # of a model that is laid out already, and the seed


def with_values(model: ViT, device: torch.device, seed: int) -> None:
    """Memory for this rank's part of every weight, and the values that the seed gives it, whatever the layout."""
    model.to_empty(device=device)
    initialize(model, seed, lambda p: LocalPart(local_values(p), local_offsets(p)))
