"""This file owns the sharding of experts over the `ep` axis, done to a finished model from outside."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from softmoe_train.model.moe import MoE
from softmoe_train.parallel.exchange import AllToAllExchange


def shard_experts(model: nn.Module, ep: DeviceMesh) -> None:
    """Give each rank of `ep` its e = E / R experts of every MoE layer, and the layer an all-to-all exchange.

    The model must be on the meta device: only shapes are cut, values come later. Names and global shapes stay. With R = 1
    nothing changes.
    """
    R = ep.size()
    if R == 1:
        return
    for layer in [m for m in model.modules() if isinstance(m, MoE)]:
        layer.exchange = AllToAllExchange(ep.get_group())
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            assert weight.is_meta and weight.shape[0] % R == 0, f"{name}: {tuple(weight.shape)} on {weight.device}"
            local = torch.empty((weight.shape[0] // R, *weight.shape[1:]), dtype=weight.dtype, device="meta")
            sharded = DTensor.from_local(local, ep, [Shard(0)], run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(sharded))
