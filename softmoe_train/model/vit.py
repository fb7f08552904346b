"""This file owns the vision transformer: patches in, class logits out.

B images  T tokens  D width  C classes
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from softmoe_train.model.init import InitRule, constant, normal, zeros
from softmoe_train.model.keyed import keys_at
from softmoe_train.model.layers import Attention, LayerNorm, Linear, Mlp, PatchEmbed
from softmoe_train.model.moe import MoE, Seen
from softmoe_train.model.records import ModelConfig, moe_blocks

Pixels = UInt8[Tensor, "B 3 Y X"] | Float[Tensor, "B 3 Y X"]
Keys = Int64[Tensor, " B"]  # one an image, from (seed, global sample): what noise in training is derived from
Real = Bool[Tensor, " B"]  # False for what only fills a batch up, and must take nothing from the others


class Predictions(NamedTuple):
    """What a model says of a batch: B images, C classes, and of its routers: L blocks with experts, M measures."""

    logits: Float[Tensor, "B C"]
    # routing.MEASURES of each block with experts, summed over groups; None: no router tells.
    told: Float[Tensor, "L M"] | None


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

    def forward(
        self, x: Float[Tensor, "B T D"], keys: Keys | None = None, real: Real | None = None, seen: Seen | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, " M"] | None]:
        """x + attention, then x + MLP or MoE; and what the router tells."""
        x = x + self.attn(self.norm1(x))
        if not self.has_experts:
            return x + self.mlp(self.norm2(x)), None
        mixed, told = self.moe(self.norm2(x), keys, real, seen)
        return x + mixed, told


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
        self.draws = config.moe.expert_dropout > 0 or (config.moe.is_sparse and config.moe.sparse.noise_std > 0)
        with_experts = set(moe_blocks(config.moe.blocks, config.depth))
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.position = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config, i in with_experts) for i in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.head = Head(config.width, config.num_classes)

    def init_rules(self) -> dict[str, InitRule]:
        """The learned position embedding: N(0, position_std²); the paper's deviation is 0.02."""
        return {"position": InitRule(normal(self.config.position_std))}

    def features(
        self, images: Pixels, keys: Keys | None = None, real: Real | None = None, seen: Seen | None = None
    ) -> tuple[Float[Tensor, "B D"], list[Tensor]]:
        """What the head sees, and what each router that tells something tells.

        Bytes are scaled from [0, 255] to [-1, 1]; floating-point images are taken as they are.
        """
        if not images.is_floating_point():
            images = images.to(torch.float32) / 127.5 - 1.0
        x = self.patch_embed(images.to(self.dtype)) + self.position.to(self.dtype)
        all_told = []
        for i, block in enumerate(self.blocks):
            # Of the block: so blocks of one shape stay one graph under torch.compile.
            own = keys_at(keys, f"blocks.{i}") if keys is not None and self.draws else None
            x, told = block(x, own, real, seen)
            if told is not None:
                all_told.append(told)
        return self.norm(x).mean(dim=1), all_told

    def forward(
        self, images: Pixels, keys: Keys | None = None, real: Real | None = None, seen: Seen | None = None
    ) -> Predictions:
        """Class logits of each image; `keys` in training, None in evaluation, where some images may not be `real`, and routers may be `seen`."""
        features, told = self.features(images, keys, real, seen)
        return Predictions(self.head(features), torch.stack(told) if told else None)


def build_model(config: ModelConfig, dtype: torch.dtype) -> ViT:
    """The model on the meta device: shapes only, to be sharded, materialised and initialised."""
    with torch.device("meta"):
        return ViT(config, dtype)
