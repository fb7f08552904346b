import torch
from torch import Tensor

from softmoe_train.bench.exchange_clock import ExchangeClock, TimedExchange
from softmoe_train.model.moe import LocalExchange


class Recorded(ExchangeClock):
    """A clock that only remembers the order of its moments."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.signs: list[int] = []

    def mark(self, sign: int) -> None:
        self.signs.append(sign)


def test_the_clock_leaves_the_numbers_alone_and_stops_while_experts_compute() -> None:
    slots = torch.randn(3, 4, 2, 5, requires_grad=True)
    gradient = torch.randn_like(slots)
    clock = Recorded()
    experts: list[list[int]] = []

    def compute(rows: Tensor, _: Tensor | None) -> Tensor:
        experts.append(list(clock.signs))
        rows.register_hook(lambda _: experts.append(list(clock.signs)))
        return rows.sin()

    results = {}
    for name, exchange in (("plain", LocalExchange()), ("timed", TimedExchange(LocalExchange(), clock))):
        out = exchange.through(slots, compute)
        (grad,) = torch.autograd.grad(out, slots, gradient)
        results[name] = (out, grad)
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    assert clock.signs == [-1, +1, -1, +1] * 2, "forward and backward: out, there, back again, home"
    assert experts[2:] == [[-1, +1], [-1, +1, -1, +1, -1, +1]], "the experts run while the clock stands"


def test_reading_starts_again_at_zero() -> None:
    clock = ExchangeClock(torch.device("cpu"))
    clock.mark(-1)
    clock.mark(+1)
    assert clock.read() > 0
    assert clock.read() == 0
