"""This file owns the MLPs of the experts, forward and backward.

e experts  N rows of one expert  D width  H hidden
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from softmoe_train.model.keyed import dropout, keys_at
from softmoe_train.model.products import differentiate_once, product_dtype

OUTPUTS = "outputs"  # the place whose keys drop outputs; those of hidden values are a row's own


class Dropout(NamedTuple):
    """Which of a row's values are dropped, hidden and out: by the row's key, the same ones on every layout and in recompute."""

    keys: Int64[Tensor, "e N"]
    rate: float


def expert_mlp(
    x: Float[Tensor, "e N D"],
    w1: Float[Tensor, "e D H"],
    b1: Float[Tensor, "e H"],
    w2: Float[Tensor, "e H D"],
    b2: Float[Tensor, "e D"],
    gate: tuple[Float[Tensor, "e D H"], Float[Tensor, "e H"]] | None = None,
    dropped: Dropout | None = None,
) -> Float[Tensor, "e N D"]:
    """Apply expert i to rows x[i]: width to hidden, GELU (tanh form, as flax), hidden to width; in the dtype of x.

    With a gate, weight and bias, the GELU is of a second hidden layer and the first is multiplied by it:
    (gelu(x wg + bg) (x w1 + b1)) w2 + b2. Keeps for backward the rows and both sides of the GELU (of a gated one, both hidden layers
    and their product: as much, H being two thirds), and no cast of the weights; which hidden values are dropped is derived again. Dropout is that of V-MoE's
    MLP block: of the hidden values, and of the outputs.
    """
    drop = dropped or (None, 0.0)
    if gate is None:
        outputs = _ExpertMlp.apply(x, w1, b1, w2, b2, *drop)
    else:
        outputs = _GatedMlp.apply(x, w1, b1, *gate, w2, b2, *drop)
    assert isinstance(outputs, Tensor)
    return outputs if dropped is None else dropout(outputs, keys_at(dropped.keys, OUTPUTS), dropped.rate)


def gated_hidden(width: int, hidden: int) -> int:
    """The hidden size that gives a gated MLP the parameters of an MLP with `hidden`, the nearest (a multiple of 8 from 256 on).

    3 D h + 2 h + D = 2 D H + H + D. Products whose sizes 8 does not divide are slow on GPUs.
    """
    exact = (2 * width + 1) * hidden / (3 * width + 2)
    return 8 * round(exact / 8) if exact >= 256 else max(1, round(exact))


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keys: Tensor | None, rate: float
    ) -> Tensor:
        before = _affine(x, w1, b1)
        after = _dropped(_gelu(before), keys, rate)
        ctx.save_for_backward(x, before, after, w1, b1, w2, b2, keys)
        ctx.rate = rate
        return _affine(after, w2, b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiate_once()
        x, before, after, w1, b1, w2, b2, keys = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        d_after, d_w2, d_b2 = _affine_backward(grad, after, w2, b2, (True, *needs[2:4]))
        assert d_after is not None
        d_before = _gelu_backward(_dropped(d_after, keys, ctx.rate), before)
        return *_affine_backward(d_before, x, w1, b1, (needs_x, *needs[:2])), d_w2, d_b2, None, None


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, wg: Tensor, bg: Tensor, w2: Tensor, b2: Tensor, keys: Tensor | None, rate: float,
    ) -> Tensor:  # fmt: skip
        hidden, gate = _affine(x, w1, b1), _affine(x, wg, bg)
        after = _dropped(_gelu(gate) * hidden, keys, rate)
        ctx.save_for_backward(x, hidden, gate, after, w1, b1, wg, bg, w2, b2, keys)
        ctx.rate = rate
        return _affine(after, w2, b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiate_once()
        x, hidden, gate, after, w1, b1, wg, bg, w2, b2, keys = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        d_after, d_w2, d_b2 = _affine_backward(grad, after, w2, b2, (True, *needs[4:6]))
        assert d_after is not None
        d_after = _dropped(d_after, keys, ctx.rate)
        d_x, d_w1, d_b1 = _affine_backward(d_after * _gelu(gate), x, w1, b1, (needs_x, *needs[:2]))
        d_gate = _gelu_backward(d_after * hidden, gate)
        d_x_gate, d_wg, d_bg = _affine_backward(d_gate, x, wg, bg, (needs_x, *needs[2:4]))
        d_x = None if d_x is None or d_x_gate is None else d_x + d_x_gate
        return d_x, d_w1, d_b1, d_wg, d_bg, d_w2, d_b2, None, None


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _dropped(x: Tensor, keys: Tensor | None, rate: float) -> Tensor:
    return x if keys is None else dropout(x, keys, rate)


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
