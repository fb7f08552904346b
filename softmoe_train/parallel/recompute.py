"""This file owns activation recompute: what is computed again in backward instead of kept."""

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from softmoe_train.model.moe import MoE
from softmoe_train.model.vit import Block, ViT


def recompute(model: ViT, what: Literal["none", "block", "moe"]) -> None:
    """Keep only the inputs of each block, or of each MoE layer, and compute the rest again in backward (with its exchange).

    Names and modules stay; call it after `compile_blocks` and before `shard_fully`, whose hooks then surround the recomputed part.
    """
    match what:
        case "none":
            return
        case "block":
            chosen: list[nn.Module] = [m for m in model.modules() if isinstance(m, Block)]
        case "moe":
            chosen = [m for m in model.modules() if isinstance(m, MoE)]
    for module in chosen:
        # What is random in a layer is derived from keys, so there is no generator state to keep.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
