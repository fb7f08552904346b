"""This file owns what the loop may ask of an engine."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from softmoe_train.data.batch import Batch


class GradStats(NamedTuple):
    """What an update saw, as tensors on the device: reading them is the log's business."""

    norm: Tensor  # global gradient norm before the clip, float32; nan where the loss of a rank was not finite
    skipped: Tensor  # 1.0 where the norm was not finite and the update was a no-op
    # "L M", what routers tell (routing.MEASURES): this rank's share of the means over the global batch.
    told: Tensor | None
    moved: Tensor | None  # "L E", |update| / |weights| of each expert, the same on every rank; where that was asked for


class Engine(Protocol):
    """Holds weights, gradients and optimizer state, whatever their layout."""

    module: nn.Module
    device: torch.device
    clip_norm: float | None  # of the updates that come; None clips nothing

    def forward_backward(self, batch: Batch, *, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; returns this rank's share of the mean loss, float32, detached."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """After the last `forward_backward` and before `update`: the summed gradients of the global batch by name, unclipped."""
        ...

    def update(self, lr: float, *, moves: bool = False) -> GradStats:
        """Reduce, clip, step, and forget the gradients. With `moves` tell how far experts move: a copy of them for as long as it takes."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the module computes with the moving average of the weights; only where averaging is switched on."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that resumes, by layout-free name; the tensors share storage with the engine."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over what was read into the tensors of `state_dict()`; without any of `average.`, the average starts from the weights."""
        ...
