"""This file owns sums over a dim that the layout cuts: how they are added up over ranks, and how the results are laid out."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from softmoe_train.optim.adafactor import DimSum


class DimSums:
    """Adds up, in place, sums over a dim of these parameters: one all-reduce for each group of ranks that shares cut dims."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters

    def __call__(self, sums: Sequence[DimSum]) -> None:
        """Every rank must call it with the same names and dims in the same order."""
        buckets: dict[ProcessGroup, list[Tensor]] = {}
        for name, dim, values in sums:
            group = _group_that_cuts(self.parameters[name], dim)
            if group is not None:
                buckets.setdefault(group, []).append(values)
        for group, parts in buckets.items():
            sent = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(sent, group=group)
            torch._foreach_copy_(
                parts,
                [s.view_as(part) for s, part in zip(sent.split([p.numel() for p in parts]), parts, strict=True)],
            )


def laid_out_without(local: Tensor, parameter: Tensor, dim: int) -> Tensor:
    """What is left of `parameter` after a sum over `dim`, as the shard of a global tensor: whole where `dim` was cut."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size([n for d, n in enumerate(parameter.shape) if d != dim])
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        [_without(placement, dim) for placement in parameter.placements],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _without(placement: Placement, dim: int) -> Placement:
    cut = getattr(placement, "dim", None)  # not is_shard(): it is False for FSDP2's strided shards
    if cut is None or cut < dim:
        return placement
    assert isinstance(placement, Shard), f"{placement}: only experts, dim 0, are cut twice"
    return Replicate() if cut == dim else Shard(cut - 1)


def _group_that_cuts(parameter: Tensor, dim: int) -> ProcessGroup | None:
    """The ranks that hold the other parts of `dim`; None where it is whole."""
    if not isinstance(parameter, DTensor):
        return None
    axes = [i for i, p in enumerate(parameter.placements) if getattr(p, "dim", None) == dim]
    assert len(axes) <= 1, f"{parameter.placements}: only experts, dim 0, are cut twice"
    return parameter.device_mesh.get_group(axes[0]) if axes else None
