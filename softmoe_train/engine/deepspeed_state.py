"""This file owns how ZeRO's flat partitions and the named tensors of a run become one another.

W ranks. ZeRO lays the weights of each optimizer group into one flat buffer, of which every rank of the group's process group
updates an equal slice: of dense weights over all W ranks, of experts on `ep` over the ranks of `expert_dp`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softmoe_train.dist import local_values


class HeldState(Protocol):
    """Where a ZeRO stage keeps gradients and optimizer state."""

    def gradient_parts(self) -> tuple[list[Tensor], Tensor]:
        """The gradients that this rank updates with, and on how many ranks each lies; to be scaled in place."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The local gradients by name, whole."""
        ...

    def moments(self, key: str) -> dict[str, Tensor]:
        """One kind of optimizer state by name, as the local weights are shaped."""
        ...

    def load(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over moments by key and name, and the weights as they are now."""
        ...

    def steps(self) -> list[Tensor]:
        """The counts of updates, one per tensor of the optimizer."""
        ...


class ReplicatedState:
    """ZeRO 0: gradients and state lie beside every weight; nothing is copied."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, copies: list[int]
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        device = next(iter(parameters.values())).device
        self.copies = torch.tensor(copies, dtype=torch.float64, device=device)

    def gradient_parts(self) -> tuple[list[Tensor], Tensor]:
        return list(self.gradients().values()), self.copies

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def moments(self, key: str) -> dict[str, Tensor]:
        return {name: self.optimizer.state[p][key] for name, p in self.parameters.items()}

    def load(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing to do: what was loaded shares our storage."""

    def steps(self) -> list[Tensor]:
        return [self.optimizer.state[p]["step"] for p in self.parameters.values()]


class PartitionedState:
    """ZeRO 1 and 2. `gradients` and `moments` gather copies: one flat buffer per group and call, on the device of the weights."""

    def __init__(self, parameters: dict[str, nn.Parameter], zero: Any) -> None:
        self.zero = zero  # DeepSpeedZeroOptimizer
        names = {id(p): name for name, p in parameters.items()}
        self.groups = [
            _FlatGroup({names[id(p)]: p for p in members}, flat, master, group)
            for members, flat, master, group in zip(
                zero.bit16_groups,
                zero.bit16_groups_flat,
                zero.single_partition_of_fp32_groups,
                zero.real_dp_process_group,
                strict=True,
            )
        ]
        self.order = list(parameters)

    def gradient_parts(self) -> tuple[list[Tensor], Tensor]:
        """Slices of the sums over ranks: every value lies on one rank."""
        parts = [part for i in range(len(self.groups)) for part in self._parts(i)]
        return parts, torch.ones(len(parts), dtype=torch.float64, device=parts[0].device)

    def gradients(self) -> dict[str, Tensor]:
        slices = [torch.cat([part.flatten() for part in self._parts(i)]) for i in range(len(self.groups))]
        return self._gathered(slices)

    def moments(self, key: str) -> dict[str, Tensor]:
        return self._gathered([self.zero.optimizer.state[group.master][key] for group in self.groups])

    @torch.no_grad()
    def load(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        for group in self.groups:
            for key, tensors in moments.items():
                group.cut(tensors, self.zero.optimizer.state[group.master][key])
        # ZeRO updates copies of the weights and would write the old ones back over what was loaded.
        self.zero.refresh_fp32_params()

    def steps(self) -> list[Tensor]:
        return [self.zero.optimizer.state[group.master]["step"] for group in self.groups]

    def _parts(self, i: int) -> list[Tensor]:
        if not self.zero.cpu_offload:
            return self.zero.averaged_gradients[i]
        self.zero._wait_for_offload_copies()  # from the device, which DeepSpeed awaits only in its step
        return [self.groups[i].master.grad]

    def _gathered(self, slices: list[Tensor]) -> dict[str, Tensor]:
        found = {k: v for group, part in zip(self.groups, slices, strict=True) for k, v in group.gather(part).items()}
        return {name: found[name] for name in self.order}


class _FlatGroup:
    """One flat buffer of weights and this rank's slice of it; `master` is the copy that the optimizer updates."""

    def __init__(self, members: dict[str, nn.Parameter], flat: Tensor, master: Any, group: dist.ProcessGroup) -> None:
        self.flat = flat
        self.master = master
        self.group = group
        self.start = group.rank() * master.numel()
        # Read off the storage: padding, alignment and round robin are DeepSpeed's business.
        self.places = {name: (p.storage_offset() - flat.storage_offset(), p.shape) for name, p in members.items()}
        assert master.numel() * group.size() == flat.numel(), (master.numel(), group.size(), flat.numel())
        assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in members.values())

    def gather(self, part: Tensor) -> dict[str, Tensor]:
        """The slices of all ranks, by name, as views of one new buffer."""
        whole = torch.empty_like(self.flat)
        dist.all_gather(list(whole.chunk(self.group.size())), part.to(whole.device).contiguous(), self.group)
        return {name: whole[at : at + shape.numel()].view(shape) for name, (at, shape) in self.places.items()}

    def cut(self, tensors: Mapping[str, Tensor], part: Tensor) -> None:
        """Write this rank's slice of named tensors into `part`."""
        for name, (at, shape) in self.places.items():
            begin, end = max(at, self.start), min(at + shape.numel(), self.start + part.numel())
            if begin < end:
                values = local_values(tensors[name]).reshape(-1)[begin - at : end - at]
                part[begin - self.start : end - self.start].copy_(values)
