import torch
from torch import nn

from softmoe_train.bench.memory import count_memory

CPU = torch.device("cpu")
KIB = 1024


def test_saved_bytes_are_distinct_storages_without_parameters() -> None:
    x = torch.randn(256, requires_grad=True)  # 1 KiB
    weight = nn.Parameter(torch.randn(256))

    def forward() -> torch.Tensor:
        y = x * weight  # keeps x, and the parameter
        return y * y.view(16, 16).flatten() * x  # keeps y once, y * y and x again

    memory = count_memory(forward, [weight], torch.ones(256), CPU)
    assert memory.saved == 3 * KIB
    assert memory.saved_weights == 0


def test_copies_of_weights_are_named() -> None:
    x = torch.randn(2, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(2, 16, 8))
    memory = count_memory(lambda: x @ weight.bfloat16(), [weight], torch.ones(2, 4, 8, dtype=torch.bfloat16), CPU)
    assert memory.saved_weights == 2 * 16 * 8 * 2
    assert memory.saved == memory.saved_weights + x.numel() * 2


def test_the_peak_counts_what_is_alive_at_once() -> None:
    x = torch.randn(256, requires_grad=True)

    def forward() -> torch.Tensor:
        total = x.detach() * 2
        for _ in range(5):
            total = total + 1  # never more than two of them
        return x * 1 + total

    memory = count_memory(forward, [], torch.ones(256), CPU)
    assert 2 * KIB <= memory.peak <= 4 * KIB, memory
