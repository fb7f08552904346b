"""This file owns the moving average of the weights: its rule, its state, and how it stands in for the weights."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from softmoe_train.config import Record


class AverageConfig(Record):
    """An exponential moving average of the weights; training never sees it, evaluators measure both."""

    decay: Annotated[float, Field(gt=0, lt=1)]  # what the average keeps of itself at an update
    warmup: bool  # after t updates keep min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage


class WeightAverage:
    """The average of this rank's local tensors, float32, by name; it starts as a copy of them.

    Nothing is drawn or reduced: each rank averages what it holds, so the average is laid out as the weights are.
    """

    def __init__(self, config: AverageConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}
        self.updates = torch.zeros(1, device=next(iter(self.values.values())).device)

    @torch.no_grad()
    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Forget the past: the average is a copy of `weights`."""
        for name, value in self.values.items():
            value.copy_(weights[name])
        self.updates.zero_()

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Follow an update of the weights; where `skipped` is 1.0 nothing changes, decided on the device."""
        self.updates += 1 - skipped
        keep = torch.full_like(self.updates, self.config.decay)
        if self.config.warmup:
            keep = keep.minimum((1 + self.updates) / (10 + self.updates))
        part = (1 - keep) * (1 - skipped)
        # One call, a weight each: foreach takes no other that stays on the device.
        torch._foreach_lerp_(
            list(self.values.values()), [weights[name] for name in self.values], [part] * len(self.values)
        )

    @torch.no_grad()
    def swap(self, weights: Mapping[str, Tensor]) -> None:
        """Let `weights` hold the average and the average the weights; a second call gives each its own again, bit for bit."""
        # One tensor at a time: an exchange of all at once would need room for a third copy.
        for name, value in self.values.items():
            weight = weights[name].clone()
            weights[name].copy_(value)
            value.copy_(weight)
