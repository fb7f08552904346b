"""This file owns the FSDP2 layout: what is sharded over which ranks, in which order and precision."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from softmoe_train.model.moe import MoE
from softmoe_train.model.vit import ViT
from softmoe_train.parallel.topology import Topology


def shard_fully(model: ViT, topology: Topology, compute_dtype: torch.dtype) -> None:
    """Shard the dense weights over all ranks and the experts over `expert_dp`, block by block (after `shard_experts`).

    Left plain, and reduced by `grads.reduce_gradients`: the routers, which stay replicated in float32, and experts that the
    `ep` axis alone already spreads over all ranks. Stored weights stay float32; `compute_dtype` is what is gathered.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    plain = {p for layer in layers for p in layer.router.parameters()}
    # Order matters: inner units first, so that each block's unit takes what is left of it.
    if topology.ep.size() > 1:
        for layer in layers:
            if topology.expert_dp.size() > 1:
                _unit(layer.experts, fully_shard(layer.experts, mesh=topology.expert_dp, mp_policy=policy))
            else:
                plain |= set(layer.experts.parameters())
    # With an expert axis of 1 experts are dense weights: FSDP2 refuses two meshes over the same ranks.
    for module in [*model.blocks, model]:
        _unit(module, fully_shard(module, mesh=topology.dp, mp_policy=policy, ignored_params=plain))


def _unit(module: nn.Module, sharded: FSDPModule) -> None:
    assert module is sharded
    # The loss is already divided by the global batch, so gradients are summed. FSDP2's average would also be R times too
    # large for experts: their gradients hold the images of R ranks but it divides by expert_dp alone.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
