"""This file owns the matrix products that a measurement sees, and the one that stands for what the hardware can do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_train.model.products import product_dtype

aten = torch.ops.aten
PRODUCTS = {aten.mm: 2, aten.bmm: 2, aten.addmm: 3, aten.baddbmm: 3}  # and the number of arguments up to the factors
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns: large enough for full speed, small enough for a round


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the hardware has products of this dtype: a CPU without bf16 instructions takes scalar code for them."""
    return product_dtype(torch.empty(0, dtype=dtype, device=device)) == dtype


class Executed(TorchDispatchMode):
    """Sees the matrix products that run inside: the dtype of their factors and their FLOPs, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            *_, left, right = args[: PRODUCTS[func._overloadpacket]]
            assert left.dtype == right.dtype, (left.dtype, right.dtype)
            self.products.append((left.dtype, 2 * result.numel() * left.shape[-1]))
        return result


def peak_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A square product into a buffer that stays, and its FLOPs; in float32 where the hardware has no product of `dtype`."""
    size = PEAK_SIZE[device.type]
    dtype = dtype if multiplies(dtype, device) else torch.float32
    left, right, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(left, right, out=out), 2 * size**3
