"""This file owns gradients across ranks: the sums that no sharded unit makes, the global norm and the clip.

W ranks. The loss of each rank is divided by the global batch, so gradients over ranks are sums, never means.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from softmoe_train.dist import local_values, sum_over_world
from softmoe_train.parallel.topology import Topology

BUCKET_BYTES = 64 * 2**20


def reduce_gradients(parameters: Iterable[nn.Parameter], topology: Topology) -> None:
    """Sum, in place, the gradients that FSDP2 does not: plain weights over all ranks, experts on `ep` over `expert_dp`."""
    plain: list[Tensor] = []
    experts: list[Tensor] = []
    for p in parameters:
        assert p.grad is not None
        if not isinstance(p, DTensor):
            plain.append(p.grad)
        elif p.device_mesh.mesh_dim_names == ("ep",):
            experts.append(local_values(p.grad))
    _all_reduce(plain, topology.dp.get_group())
    _all_reduce(experts, topology.expert_dp.get_group())


def grad_norm(gradients: Sequence[Tensor], copies: Tensor) -> Tensor:
    """The 2-norm of the whole gradient, float32, equal on all ranks; each value counted once, whatever the layout.

    `copies` is what `copies_of` says of the same parameters.
    """
    squares = torch.stack(torch._foreach_norm([local_values(g) for g in gradients])).double().square()
    return sum_over_world((squares / copies).sum()).sqrt().float()


def clip_(gradients: Sequence[Tensor], norm: Tensor, limit: float | None) -> None:
    """Scale local gradients in place by min(1, limit / norm), as optax does (no epsilon); None leaves them."""
    if limit is not None:
        torch._foreach_mul_(list(gradients), torch.where(norm > limit, limit / norm, torch.ones_like(norm)))


def copies_of(parameters: Sequence[Tensor], size: int) -> Tensor:
    """On how many of `size` ranks each value of a parameter (and of its gradient) lies, float64, on their device."""
    return torch.tensor([_copies(p, size) for p in parameters], dtype=torch.float64, device=parameters[0].device)


def _copies(parameter: Tensor, size: int) -> int:
    if not isinstance(parameter, DTensor):
        return size
    mesh = parameter.device_mesh
    # Not is_shard(): it is False for the strided shards of FSDP2 over an expert weight.
    cut = math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return size // cut


def _all_reduce(gradients: list[Tensor], group: ProcessGroup) -> None:
    if group.size() == 1:
        return
    bucket: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        full = sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES
        if full or i == len(gradients) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat, group=group)
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
            bucket = []
