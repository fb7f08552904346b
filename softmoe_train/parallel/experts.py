"""This file owns the sharding of experts over the `ep` axis, done to a finished model from outside."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from softmoe_train.model.moe import MoE, SlotExchange


def shard_experts(model: nn.Module, ep: DeviceMesh, exchange: SlotExchange) -> None:
    """Give each rank of `ep` its e = E / R experts of every MoE layer, and the layer the exchange that `build_exchange` made.

    The model must be on the meta device: only shapes are cut, values come later. Names and global shapes stay. With R = 1
    the weights are left alone.
    """
    R = ep.size()
    for layer in [m for m in model.modules() if isinstance(m, MoE)]:
        layer.exchange = exchange
        if R == 1:
            continue
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            assert weight.is_meta and weight.shape[0] % R == 0, f"{name}: {tuple(weight.shape)} on {weight.device}"
            local = torch.empty((weight.shape[0] // R, *weight.shape[1:]), dtype=weight.dtype, device="meta")
            sharded = DTensor.from_local(local, ep, [Shard(0)], run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(sharded))
