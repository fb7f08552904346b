"""This file owns gradients across ranks: the sums that no sharded unit makes, the global norm and the clip.

W ranks. The loss of each rank is divided by the global batch, so gradients over ranks are sums, never means.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from softmoe_train.dist import local_values, sum_over_world
from softmoe_train.parallel.topology import Topology

BUCKET_BYTES = 25 * 2**20  # what a collective carries at least: latency is paid once for small gradients


class GradReducer:
    """Sums the gradients that FSDP2 does not, each bucket under the backward of those before it.

    These are plain weights, over all ranks, and experts that only `ep` spreads, over `expert_dp`. A large gradient is reduced in
    place, small ones are copied together. Every rank starts the same collectives in the same order.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], topology: Topology) -> None:
        self.buckets = [_Bucket(ps, group) for ps, group in _buckets(parameters, topology) if group.size() > 1]
        self.started = 0
        self.armed = False
        self.summed = True
        for bucket in self.buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(partial(self._ready, bucket))

    def arm(self) -> None:
        """The backward that comes is the last before `finish`: reduce each gradient as it becomes ready."""
        self.armed = True

    def finish(self) -> None:
        """Wait until every sum has arrived (on a GPU its stream waits, not the host); once more changes nothing."""
        if not self.armed:
            assert self.summed, "the last micro-batch was not said to be the last"
            return
        assert self.started == len(self.buckets), f"{self.started} of {len(self.buckets)} buckets were ready"
        for bucket in self.buckets:
            bucket.finish()
        self.started = 0
        self.armed = False
        self.summed = True

    def _ready(self, bucket: "_Bucket", _: Tensor) -> None:
        if not self.armed:
            self.summed = False
            return
        bucket.missing -= 1
        while self.started < len(self.buckets) and self.buckets[self.started].missing == 0:
            self.buckets[self.started].start()
            self.started += 1


class _Bucket:
    """Gradients that travel in one all-reduce."""

    def __init__(self, parameters: list[nn.Parameter], group: ProcessGroup) -> None:
        self.parameters = parameters
        self.group = group
        self.missing = len(parameters)

    def start(self) -> None:
        self.gradients = [local_values(p.grad) for p in self.parameters if p.grad is not None]
        assert len(self.gradients) == len(self.parameters)
        alone = len(self.gradients) == 1 and self.gradients[0].is_contiguous()
        self.sent = self.gradients[0] if alone else torch.cat([g.flatten() for g in self.gradients])
        self.work = dist.all_reduce(self.sent, group=self.group, async_op=True)

    def finish(self) -> None:
        assert self.work is not None
        self.work.wait()
        if self.sent is not self.gradients[0]:
            parts = self.sent.split([g.numel() for g in self.gradients])
            torch._foreach_copy_(
                self.gradients, [part.view_as(g) for part, g in zip(parts, self.gradients, strict=True)]
            )
        del self.sent, self.gradients, self.work
        self.missing = len(self.parameters)


def _buckets(
    parameters: Iterable[nn.Parameter], topology: Topology
) -> Iterator[tuple[list[nn.Parameter], ProcessGroup]]:
    """In the order in which backward completes them, which is about the reverse of their definition."""
    dense, experts = topology.dp.get_group(), topology.expert_dp.get_group()
    waiting: dict[ProcessGroup, list[nn.Parameter]] = {dense: [], experts: []}
    for p in reversed(list(parameters)):
        if isinstance(p, DTensor) and p.device_mesh.mesh_dim_names != ("ep",):
            continue  # FSDP2's
        group = experts if isinstance(p, DTensor) else dense
        if _bytes([p]) >= BUCKET_BYTES:
            yield [p], group
            continue
        waiting[group].append(p)
        if _bytes(waiting[group]) >= BUCKET_BYTES:
            yield waiting[group], group
            waiting[group] = []
    for group, rest in waiting.items():
        if rest:
            yield rest, group


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(local_values(p).nbytes for p in parameters)


def grad_norm(gradients: Sequence[Tensor], copies: Tensor, loss: Tensor) -> Tensor:
    """The 2-norm of the whole gradient, float32, equal on all ranks; each value counted once, whatever the layout.

    `copies` is what `copies_of` says of the same parameters. `loss` is this rank's: the norm is nan where that of any rank is
    not finite.
    """
    # In float64: the CPU sums one value after another, and 75 million in float32 come out 0.7 % too small.
    norms = torch._foreach_norm([local_values(g) for g in gradients], 2, dtype=torch.float64)
    squares = (torch.stack(norms).square() / copies).sum()
    # A loss can overflow under a finite gradient (that of the sigmoid is at most 1). Times zero it is 0 or nan, so one sum tells
    # every rank of both. To `copies`: an optimizer on the host measures there.
    return sum_over_world(squares + 0 * loss.to(copies)).sqrt().float()


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
