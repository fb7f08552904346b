"""This file owns torch.compile: which parts of the model become one graph each."""

import torch

from softmoe_train.model.vit import Block, ViT


def compile_blocks(model: ViT, *, whole: bool) -> None:
    """Compile every block as one graph without breaks; blocks of the same shape share it.

    Call it before `recompute` and `shard_fully`, whose checkpoints and hooks stay outside of the graphs (a recomputed DTensor
    inside of one fails in torch 2.13). Where those cut a block with experts (not `whole`), its parts are compiled each by itself.
    """
    # Dense and expert blocks, train and evaluation, batches of both: each is one more version of the same code.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.modules():
        if isinstance(block, Block):
            parts = [block] if whole or not block.has_experts else [block.attn, block.moe.router, block.moe.experts]
            for part in parts:
                part.forward = torch.compile(part.forward, fullgraph=True)
