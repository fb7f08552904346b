"""This file owns what a model costs wherever it runs: parameters, and FLOPs in our count and in the paper's two.

B images  T tokens  D width  E experts  S slots per expert of a group  n images of a group
"""

from typing import NamedTuple

import torch

from softmoe_train.model.count import forward_flops, training_flops
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import ModelConfig, moe_blocks
from softmoe_train.model.vit import build_model


class Cost(NamedTuple):
    """Of one model; FLOPs of one image."""

    parameters: int
    expert_parameters: int
    active_parameters: int  # of an image: all but experts, and of those as many as it has slots, where that is fewer
    slots_per_token: float  # rows that experts compute, to those of a dense MLP; 0 without experts
    forward_flops: int  # two a multiply-add
    training_flops: int  # forward and backward
    paper_training_flops: int  # as the function of that name says


def cost_of(config: ModelConfig) -> Cost:
    """Counted in the model itself, on shapes alone."""
    model = build_model(config, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    slots = config.moe.num_experts * config.capacity / config.group_images if layers else 0.0
    reached = min(1.0, slots / config.moe.num_experts)
    forward = forward_flops(config)
    return Cost(
        parameters=total,
        expert_parameters=in_experts,
        active_parameters=round(total - in_experts * (1 - reached)),
        slots_per_token=slots / config.num_tokens,
        forward_flops=forward,
        training_flops=training_flops(config),
        paper_training_flops=paper_training_flops(config, forward),
    )


def paper_training_flops(config: ModelConfig, forward: int) -> int:
    """Of one image, as the paper counts training (paper.md 2.2): one a multiply-add of the `forward` FLOPs, times three.

    Its sparse routers dispatch and combine by products with one-hot matrices, which our gathers do not make: 2 T D (E S) in each layer,
    S for the whole group.
    """
    one_hot = 0
    if config.moe.is_sparse:
        layers = len(moe_blocks(config.moe.blocks, config.depth))
        one_hot = layers * 2 * config.num_tokens * config.width * config.moe.num_experts * config.capacity
    return 3 * (forward // 2 + one_hot)
