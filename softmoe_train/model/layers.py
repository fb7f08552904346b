"""This file owns the dense layers of the vision transformer.

B images  T tokens  D width  H hidden  N heads  P patch size.
Stored parameters are float32; each layer computes in the dtype of its input and casts its parameters to it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_train.model.init import InitRule, lecun_normal, normal, ones, xavier_uniform, zeros

NORM_EPS = 1e-6  # flax's default, paper.md 1.3


class Linear(nn.Linear):
    """A linear map with Xavier weights per output part; the bias is zero or N(0, bias_std²).

    `parts` maps of the same input are stored as one: each starts as a (in, out / parts) matrix of its own.
    """

    def __init__(self, in_features: int, out_features: int, *, bias_std: float = 0.0, parts: int = 1) -> None:
        super().__init__(in_features, out_features)
        self.bias_std = bias_std
        self.parts = parts

    def init_rules(self) -> dict[str, InitRule]:
        """Xavier-uniform weight, zero or tiny normal bias (paper.md 1.3)."""
        return {
            "weight": InitRule(xavier_uniform(self.in_features, self.out_features // self.parts)),
            "bias": InitRule(normal(self.bias_std) if self.bias_std else zeros),
        }

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the overridden method)
        """Map the last dim, in the dtype of the input."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dim with float32 statistics, returned in the dtype of the input."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__(width, eps=NORM_EPS, bias=bias)

    def init_rules(self) -> dict[str, InitRule]:
        """Scale one, bias zero."""
        return {"weight": InitRule(ones), "bias": InitRule(zeros)}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the overridden method)
        """Normalise; half-precision inputs are widened for the statistics and the scale."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        # Through the compute dtype first: a sharded layout gathers parameters in it, and must not see other numbers.
        weight = self.weight.to(input.dtype).to(wide.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype).to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class PatchEmbed(nn.Module):
    """Cut an image into patches and embed each: a convolution of patch size and stride, written as one product."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3 * patch_size**2))
        self.bias = nn.Parameter(torch.empty(width))

    def init_rules(self) -> dict[str, InitRule]:
        """LeCun-normal kernel with fan-in 3 P², zero bias (paper.md 1.3)."""
        return {"weight": InitRule(lecun_normal(3 * self.patch_size**2)), "bias": InitRule(zeros)}

    def forward(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B T D"]:
        """Patches in row-major order; within a patch the order of a (3, P, P) convolution kernel."""
        B, C, Y, X = images.shape
        P = self.patch_size
        patches = images.reshape(B, C, Y // P, P, X // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)
        return F.linear(patches, self.weight.to(images.dtype), self.bias.to(images.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with query and key normalised over the head dim, scale only (paper.md 1.3)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, parts=3)
        self.query_norm = LayerNorm(width // num_heads, bias=False)
        self.key_norm = LayerNorm(width // num_heads, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Every token attends to every token of its image."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """The dense MLP of a block: width to hidden, GELU (tanh form, as flax), hidden to width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias_std=1e-6)
        self.fc2 = Linear(hidden, width, bias_std=1e-6)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Map each token by itself."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
