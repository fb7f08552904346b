"""This file owns the clock inside a step: how long its slots are under way, forward and backward, without a host sync.

It wraps a layer's exchange. What an exchange hides under its own experts is not counted, since only what lies between
entering and leaving it is, less the time of the experts in between.
"""

import time
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softmoe_train.model.moe import Compute, MoE, SlotExchange


class ExchangeClock:
    """Adds up the moments of one step, each with its sign; read it when the device has nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[int, torch.cuda.Event]] = []

    def mark(self, sign: int) -> None:
        """Now, counted with `sign`: -1 where slots set out, +1 where they have arrived."""
        if self.device.type != "cuda":
            self._seconds += sign * time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((sign, event))

    def read(self) -> float:
        """Seconds since the last read."""
        if self._events:
            first = self._events[0][1]
            self._seconds = sum(sign * first.elapsed_time(event) for sign, event in self._events) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class _Mark(torch.autograd.Function):
    """The identity, whose backward marks the moment at which the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: ExchangeClock, sign: int) -> Tensor:
        ctx.clock, ctx.sign = clock, sign
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.mark(ctx.sign)
        return gradients[0], None, None


class TimedExchange:
    """A SlotExchange that does what `inner` does and marks when."""

    def __init__(self, inner: SlotExchange, clock: ExchangeClock) -> None:
        self.inner = inner
        self.clock = clock

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Compute, keys: Int64[Tensor, "G E"] | None = None
    ) -> Float[Tensor, "G E S D"]:
        """As `inner` carries them."""
        self.clock.mark(-1)
        arrived = self.inner.through(
            _marked(slots, self.clock, +1), lambda rows, keys: self._timed(rows, keys, compute), keys
        )
        self.clock.mark(+1)
        return _marked(arrived, self.clock, -1)

    def local(self, weight: Tensor) -> Tensor:
        """As `inner` has it."""
        return self.inner.local(weight)

    def _timed(self, rows: Tensor, keys: Tensor | None, compute: Compute) -> Tensor:
        self.clock.mark(+1)
        results = compute(_marked(rows, self.clock, -1), keys)
        self.clock.mark(-1)
        return _marked(results, self.clock, +1)


def _marked(tensor: Tensor, clock: ExchangeClock, sign: int) -> Tensor:
    marked = _Mark.apply(tensor, clock, sign)
    assert isinstance(marked, Tensor), type(marked)
    return marked


def moe_layers(model: nn.Module) -> list[MoE]:
    """The layers that hold an exchange."""
    return [module for module in model.modules() if isinstance(module, MoE)]
