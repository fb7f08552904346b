"""This file owns the MLPs of the experts, forward and backward.

e experts  N rows of one expert  D width  H hidden
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from softmoe_train.model.products import differentiate_once, product_dtype


def expert_mlp(
    x: Float[Tensor, "e N D"],
    w1: Float[Tensor, "e D H"],
    b1: Float[Tensor, "e H"],
    w2: Float[Tensor, "e H D"],
    b2: Float[Tensor, "e D"],
) -> Float[Tensor, "e N D"]:
    """Apply expert i to rows x[i]: width to hidden, GELU (tanh form, as flax), hidden to width; in the dtype of x.

    Keeps for backward the rows and both sides of the GELU, and no cast of the weights.
    """
    outputs = _ExpertMlp.apply(x, w1, b1, w2, b2)
    assert isinstance(outputs, Tensor)
    return outputs


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        before = _affine(x, w1, b1)
        after = F.gelu(before, approximate="tanh")
        ctx.save_for_backward(x, before, after, w1, b1, w2, b2)
        return _affine(after, w2, b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiate_once()
        x, before, after, w1, b1, w2, b2 = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        d_after, d_w2, d_b2 = _affine_backward(grad, after, w2, b2, (True, *needs[2:]))
        assert d_after is not None
        d_before = torch.ops.aten.gelu_backward(d_after, before, approximate="tanh")
        return *_affine_backward(d_before, x, w1, b1, (needs_x, *needs[:2])), d_w2, d_b2


def _affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x @ w + b for each expert, with the weights rounded to the dtype of x."""
    w, b = (t.to(x.dtype).to(product_dtype(x)) for t in (w, b))
    with torch.autocast(x.device.type, enabled=False):
        return torch.baddbmm(b.unsqueeze(1), x.to(w.dtype), w).to(x.dtype)


def _affine_backward(
    grad: Tensor, x: Tensor, w: Tensor, b: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `_affine`'s arguments that are needed, each in the dtype of its argument."""
    dtype = product_dtype(x)
    g = grad.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        d_x = torch.bmm(g, w.to(x.dtype).to(dtype).mT).to(x.dtype) if needs[0] else None
        d_w = torch.bmm(x.to(dtype).mT, g).to(w.dtype) if needs[1] else None
        d_b = g.sum(1, dtype=b.dtype) if needs[2] else None
    return d_x, d_w, d_b
