"""This file owns the floor of the MoE layer: the matrix products that it executes, and nothing else.

B images  T tokens  D width  E experts  S slots per expert  s = E·S slots of an image  H hidden
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerShape(NamedTuple):
    """The sizes that decide what a MoE layer has to compute."""

    images: int
    tokens: int
    width: int
    hidden: int
    experts: int
    slots: int  # per expert

    @property
    def forward_flops(self) -> int:
        """Two a multiplication and addition: logits, dispatch and combine, then both products of the experts."""
        B, T, D, H, E, S = self
        return 2 * B * E * S * (3 * T * D + 2 * D * H)

    @property
    def flops(self) -> int:
        """Forward, and in backward a product for each of the two inputs of every forward product."""
        return 3 * self.forward_flops

    @property
    def parameters(self) -> int:
        """Experts, slot parameters and the scale."""
        _, _, D, H, E, S = self
        return E * (2 * D * H + H + D) + D * E * S + 1

    def input_bytes(self, dtype: torch.dtype) -> int:
        """B·T·D, all that a recomputed layer keeps for its backward."""
        return self.images * self.tokens * self.width * dtype.itemsize

    def saved_bound(self, dtype: torch.dtype) -> int:
        """The most bytes that a forward may keep for its backward: 2·B·s·H + B·(T + 2s)·D in `dtype`, 2·B·T·s in float32."""
        B, T, D, H, E, S = self
        s = E * S
        return (2 * B * s * H + B * (T + 2 * s) * D) * dtype.itemsize + 2 * B * T * s * 4


class Product(NamedTuple):
    """One matrix product, or a batch of them, and where it goes."""

    name: str
    out: Tensor
    left: Tensor
    right: Tensor

    @property
    def flops(self) -> int:
        """Two a multiplication and addition."""
        return 2 * self.out.numel() * self.left.shape[-1]


class Floor:
    """The products of forward and backward, in their dtypes, into buffers that stay.

    `product` is the dtype in which the layer multiplies tensors of `dtype`; the logits and their gradients are float32 as the
    router insists. Below float32 the bare activation and its gradient are counted in, in `dtype`: no layer can do without.
    """

    def __init__(self, shape: LayerShape, dtype: torch.dtype, product: torch.dtype, device: torch.device) -> None:
        B, T, D, H, E, S = shape
        s = E * S

        def made(*sizes: int, of: torch.dtype = product) -> Tensor:
            return torch.randn(sizes, dtype=of, device=device)

        wide = torch.float32
        tokens, tokens_wide, phi, logits = made(B, T, D), made(B * T, D, of=wide), made(D, s, of=wide), made(B * T, s, of=wide)  # fmt: skip
        dispatch, combine, slots, outputs = made(B, T, s), made(B, T, s), made(B, s, D), made(B, s, D)
        rows, hidden, results = made(E, B * S, D), made(E, B * S, H), made(E, B * S, D)
        w1, w2, result = made(E, D, H) / D**0.5, made(E, H, D) / H**0.5, made(B, T, D)
        self.forward_products = [
            Product("logits", logits, tokens_wide, phi),
            Product("dispatch", slots, dispatch.mT, tokens),
            Product("w1", hidden, rows, w1),
            Product("w2", results, hidden, w2),
            Product("combine", result, combine, outputs),
        ]
        d_hidden, d_logits = made(E, B * S, H), made(B * T, s, of=wide)
        self.backward_products = [
            Product("combine, weights", made(B, T, s), result, outputs.mT),
            Product("combine, outputs", made(B, s, D), combine.mT, result),
            Product("w2, input", d_hidden, results, w2.mT),
            Product("w2, weight", made(E, H, D), hidden.mT, results),
            Product("w1, input", made(E, B * S, D), d_hidden, w1.mT),
            Product("w1, weight", made(E, D, H), rows.mT, d_hidden),
            Product("dispatch, weights", made(B, T, s), tokens, slots.mT),
            Product("dispatch, tokens", made(B, T, D), dispatch, slots),
            Product("logits, tokens", made(B * T, D, of=wide), d_logits, phi.mT),
            Product("logits, phi", made(D, s, of=wide), tokens_wide.mT, d_logits),
        ]
        self.activation = None if dtype == wide else tuple(made(E, B * S, H, of=dtype) for _ in range(3))

    def run(self) -> None:
        """All of it once."""
        with torch.no_grad():
            for product in [*self.forward_products, *self.backward_products]:
                torch.matmul(product.left, product.right, out=product.out)
            if self.activation is not None:
                before, after, gradient = self.activation
                torch.ops.aten.gelu.out(before, approximate="tanh", out=after)
                torch.ops.aten.gelu_backward.grad_input(gradient, before, approximate="tanh", grad_input=after)
