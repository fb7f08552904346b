"""This file owns what a model costs wherever it runs: parameters, and FLOPs in our count and in the paper's two.

B images  T tokens  D width  E experts  S slots per expert of a group  n images of a group
"""

from typing import NamedTuple

import torch

from softmoe_train.model.count import model_flops
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import ModelConfig, moe_blocks
from softmoe_train.model.vit import build_model


class Cost(NamedTuple):
    """Of one model; FLOPs of one image."""

    parameters: int
    expert_parameters: int
    active_parameters: (
        int  # per image: all but experts, and as many experts as an image has slots, on the mean of its group
    )
    slots_per_token: float  # rows that experts compute, to those of a dense MLP; 0 without experts
    forward_flops: int  # two a multiply-add
    training_flops: int  # forward and backward
    one_hot_flops: (
        int  # of a forward, what the paper's sparse routers add: dispatch and combine as products with one-hot matrices
    )

    def paper_training_exaflop(self, images: int) -> float:
        """As the paper counts training: one a multiply-add, times three, with the one-hot products of sparse routers (paper.md 2.2)."""
        return 3 * images * (self.forward_flops + self.one_hot_flops) / 2 / 1e18

    def training_exaflop(self, images: int) -> float:
        """As we count: two a multiply-add, of the forward and backward that run."""
        return images * self.training_flops / 1e18


def cost_of(config: ModelConfig) -> Cost:
    """Counted in the model itself, on shapes alone."""
    model = build_model(config, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    slots = config.moe.num_experts * config.capacity / config.group_images if layers else 0.0
    reached = min(1.0, slots / config.moe.num_experts)
    flops = model_flops(config)
    return Cost(
        parameters=total,
        expert_parameters=in_experts,
        active_parameters=round(total - in_experts * (1 - reached)),
        slots_per_token=slots / config.num_tokens,
        forward_flops=flops.forward,
        training_flops=flops.training,
        one_hot_flops=2 * one_hot_products(config),
    )


def one_hot_products(config: ModelConfig) -> int:
    """Multiply-adds of one image that a gather does not make: 2 T D (E S) in each layer, S for the whole group."""
    if not config.moe.is_sparse:
        return 0
    slots = config.moe.num_experts * config.capacity
    return len(moe_blocks(config.moe.blocks, config.depth)) * 2 * config.num_tokens * config.width * slots
