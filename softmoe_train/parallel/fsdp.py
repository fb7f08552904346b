"""This file owns the FSDP2 layout: what is sharded over which ranks, along which dim, in which order and precision."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from softmoe_train.dist import local_values
from softmoe_train.model.moe import MoE
from softmoe_train.model.vit import ViT
from softmoe_train.parallel.topology import Topology


def shard_fully(model: ViT, topology: Topology, compute_dtype: torch.dtype, *, prefetch: int | None) -> None:
    """Shard the dense weights over `topology.dense` and the experts over `topology.experts`, block by block (after `shard_experts`).

    Left plain, and reduced by `grads.GradReducer`: the routers, which stay replicated in float32, and experts that the `ep` axis
    alone already spreads. Stored weights stay float32; `compute_dtype` is what is gathered. Each block gathers the next
    `prefetch` blocks ahead of their use, forward and backward.
    """
    assert topology.dense is not None
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    plain = {p for layer in layers for p in layer.router.parameters()}
    # Order matters: inner units first, so that each block's unit takes what is left of it.
    if topology.experts is not None:
        for layer in layers:
            place = _dims_of([layer], topology.experts).get
            _unit(
                layer.experts,
                fully_shard(layer.experts, mesh=topology.experts, mp_policy=policy, shard_placement_fn=place),
            )
    elif topology.ep.size() > 1:
        plain |= {p for layer in layers for p in layer.experts.parameters()}
    # With an expert axis of 1 experts are dense weights: FSDP2 refuses two meshes over the same ranks.
    dims = _dims_of(layers, topology.dense)
    for module in [*model.blocks, model]:
        _unit(
            module,
            fully_shard(
                module, mesh=topology.dense, mp_policy=policy, ignored_params=plain, shard_placement_fn=dims.get
            ),
        )
    if prefetch is not None:
        _prefetch(model, prefetch)


def _unit(module: nn.Module, sharded: FSDPModule) -> None:
    assert module is sharded
    # The loss is already divided by the global batch, so gradients are summed. FSDP2's average would also be R times too
    # large for experts: their gradients hold the images of R ranks but it divides by expert_dp alone.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _dims_of(layers: list[MoE], mesh: DeviceMesh) -> dict[nn.Parameter, Shard]:
    """Where to cut expert weights when experts cannot be dealt evenly to the ranks of a copy: inside each, along the hidden dim."""
    ranks = mesh.size(mesh.ndim - 1)
    dims: dict[nn.Parameter, Shard] = {}
    for experts in [layer.experts for layer in layers]:
        _, width, hidden = experts.w1.shape
        if local_values(experts.w1).shape[0] % ranks == 0 or hidden % ranks:
            continue  # dim 0 is all that FSDP2 cuts unevenly
        dims |= {p: Shard(experts.HIDDEN_DIMS[name]) for name, p in experts.named_parameters() if name != "b2"}
        if width % ranks == 0:
            dims[experts.b2] = Shard(1)
    return dims


def _prefetch(model: ViT, ahead: int) -> None:
    # A block before its experts, in backward too: FSDP2 waits for a unit where the gradient of its output arrives, and the block's
    # output comes last, although its own weights are used after those of its experts.
    def units(blocks: list[nn.Module]) -> list[FSDPModule]:
        return [m for block in blocks for m in block.modules() if isinstance(m, FSDPModule)]

    blocks = list(model.blocks)
    for i, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(units(blocks[i + 1 : i + 1 + ahead]))
        block.set_modules_to_backward_prefetch(units(blocks[max(0, i - ahead) : i][::-1]))
