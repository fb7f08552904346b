"""This file owns the vision transformer: patches in, class logits out.

B images  T tokens  D width  C classes
"""

from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from softmoe_train.config import Record
from softmoe_train.model.init import InitRule, constant, normal, zeros
from softmoe_train.model.layers import Attention, LayerNorm, Linear, Mlp, PatchEmbed
from softmoe_train.model.moe import MoE, MoEConfig, moe_blocks

Positive = Annotated[int, Field(ge=1)]


class ModelConfig(Record):
    """A vision transformer of paper.md 2.1, with experts in the blocks that `moe` names."""

    image_size: Positive  # pixels
    patch_size: Positive  # pixels
    width: Positive
    depth: Positive
    mlp_dim: Positive
    num_heads: Positive
    num_classes: Positive
    position_std: Annotated[float, Field(ge=0)]
    moe: MoEConfig

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        problems = []
        if self.image_size % self.patch_size:
            divisors = [d for d in range(1, self.image_size + 1) if self.image_size % d == 0]
            problems.append(
                f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}; use one of {divisors}"
            )
        if self.width % self.num_heads:
            problems.append(
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}; use a divisor of the width"
            )
        try:
            moe_blocks(self.moe.blocks, self.depth)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def has_experts(self) -> bool:
        """Whether any block holds experts."""
        return bool(moe_blocks(self.moe.blocks, self.depth))

    @property
    def num_experts(self) -> int:
        """E, or 1 where no block holds experts."""
        return self.moe.num_experts if self.has_experts else 1

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Block(nn.Module):
    """A pre-norm transformer block with a dense MLP or a mixture of experts."""

    def __init__(self, config: ModelConfig, has_experts: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = LayerNorm(config.width)
        if has_experts:
            self.moe = MoE(config.moe, config.width, config.mlp_dim)
        else:
            self.mlp = Mlp(config.width, config.mlp_dim)
        self.has_experts = has_experts

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """x + attention, then x + MLP or MoE."""
        x = x + self.attn(self.norm1(x))
        return x + (self.moe if self.has_experts else self.mlp)(self.norm2(x))


class Head(Linear):
    """The linear classifier: zero kernel, bias -ln C (paper.md 1.3)."""

    def init_rules(self) -> dict[str, InitRule]:
        """A fresh head answers the uniform distribution, for the sigmoid loss too."""
        return {
            "weight": InitRule(zeros),
            "bias": InitRule(constant(-torch.log(torch.tensor(float(self.out_features))).item())),
        }


class ViT(nn.Module):
    """A vision transformer without class token: mean over the tokens of the last norm, then a linear head.

    `dtype` is what activations are computed in; parameters stay float32 and are cast where they are used.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        with_experts = set(moe_blocks(config.moe.blocks, config.depth))
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.position = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config, i in with_experts) for i in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.head = Head(config.width, config.num_classes)

    def init_rules(self) -> dict[str, InitRule]:
        """The learned position embedding: N(0, position_std²); the paper's deviation is 0.02."""
        return {"position": InitRule(normal(self.config.position_std))}

    def features(self, images: UInt8[Tensor, "B 3 Y X"] | Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B D"]:
        """What the head sees. Bytes are scaled from [0, 255] to [-1, 1]; floating-point images are taken as they are."""
        if not images.is_floating_point():
            images = images.to(torch.float32) / 127.5 - 1.0
        x = self.patch_embed(images.to(self.dtype)) + self.position.to(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(dim=1)

    def forward(self, images: UInt8[Tensor, "B 3 Y X"] | Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B C"]:
        """Class logits of each image."""
        return self.head(self.features(images))


def build_model(config: ModelConfig, dtype: torch.dtype) -> ViT:
    """The model on the meta device: shapes only, to be sharded, materialised and initialised."""
    with torch.device("meta"):
        return ViT(config, dtype)
