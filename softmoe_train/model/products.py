"""This file owns the batched products of a mixture-of-experts layer: in which dtype they run, and what their backward keeps.

Backward recomputes what costs little (casts of weights and weightings) instead of keeping it, and cannot be differentiated again.
G routing groups  K rows that are read  M rows that are made  D width
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Without bf16 instructions a bf16 product on a CPU runs in scalar code, 30 times slower than in float32.
CPU_MULTIPLIES_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of tensors like `x` run: its own, but float32 for bf16 on a CPU that cannot multiply it.

    The numbers are those of a bf16 product, which adds up in float32 and rounds once.
    """
    wide = x.dtype is torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16
    return torch.float32 if wide else x.dtype


def mix(weights: Float[Tensor, "G M K"], rows: Float[Tensor, "G K D"]) -> Float[Tensor, "G M D"]:
    """Weighted sums of rows, in the dtype of the rows; the weights may be wider. Keeps its two arguments for backward."""
    mixed = _Mix.apply(weights, rows)
    assert isinstance(mixed, Tensor)
    return mixed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weights, rows)
        return _bmm(weights, rows, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        differentiate_once()
        weights, rows = ctx.saved_tensors
        d_weights = d_rows = None
        if ctx.needs_input_grad[0]:
            # Laid out as the weights are: the softmax that made them reads both.
            if weights.is_contiguous():
                d_weights = _bmm(grad, rows.mT, rows).to(weights.dtype)
            else:
                d_weights = _bmm(rows, grad.mT, rows).to(weights.dtype).mT
        if ctx.needs_input_grad[1]:
            d_rows = _bmm(weights.mT, grad, rows)
        return d_weights, d_rows


def differentiate_once() -> None:
    """Refuse, inside a backward of ours, to be recorded for a second derivative, which would miss our share. RuntimeError."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("create_graph=True: the mixture-of-experts layer has no second derivative")


def _bmm(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a @ b of values rounded to the dtype of `like`, and so is the result."""
    dtype = product_dtype(like)
    with torch.autocast(like.device.type, enabled=False):
        return torch.bmm(a.to(like.dtype).to(dtype), b.to(like.dtype).to(dtype)).to(like.dtype)
