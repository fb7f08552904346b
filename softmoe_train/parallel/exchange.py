"""This file owns the slot exchange of an expert axis: its route, its chunks and what it sends on the wire.

G routing groups of this rank (g of one chunk)  E experts  S slots per expert  D width
R expert ranks  e = E / R local experts  N = R·g·S rows of one expert
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from softmoe_train.model.moe import Compute, LocalExchange, SlotExchange
from softmoe_train.parallel.collective import Stage
from softmoe_train.parallel.layout import ParallelConfig
from softmoe_train.parallel.topology import Topology

WIRE = {"bfloat16": torch.bfloat16}


class AllToAllExchange:
    """Sends each slot to the rank that holds its expert, and the result back, stage by stage and chunk by chunk.

    Every expert has equally many slots, empty ones included, so there are no counts to agree on. Every rank must bring the same G.
    Rows have one leading dim for each stage's axis, outermost first; their sizes multiply to R. The groups are cut into (at most)
    `chunks` runs of nearly equal length, and the exchange of one lies under the experts of another.
    """

    def __init__(self, stages: Sequence[Stage], chunks: int) -> None:
        self.stages = tuple(stages)
        self.axes = tuple(stage.R for stage in sorted(stages, key=lambda stage: stage.dim))
        self.R = math.prod(self.axes)
        self.chunks = chunks

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Compute, keys: Int64[Tensor, "G E"] | None = None
    ) -> Float[Tensor, "G E S D"]:
        """Give `compute` the rows of the local experts from all R ranks ("e N D", by rank, group, slot), once a chunk.

        Keys go ahead of all chunks, in one message a stage and peer.
        """
        G = slots.shape[0]
        n = min(self.chunks, G)
        hops = 2 * self.stages  # there and back
        sizes = [(G + k) // n for k in range(n)]
        chunks = list(slots.split(sizes))
        keys_of = [None] * n if keys is None else [k.flatten(1) for k in self._arrived(keys).split(sizes, dim=2)]
        # A software pipeline: in each tick every chunk on its way moves on by one hop, the youngest first. So what is sent
        # before the experts of this tick is waited for after them, and in backward, which runs all this in reverse, too.
        for tick in range(n + len(hops)):
            for hop in range(len(hops) + 1):
                k = tick - hop
                if not 0 <= k < n:
                    continue
                rows = chunks[k] if hop == 0 else hops[hop - 1].finish(chunks[k])
                if hop == 0:
                    rows = self._outgoing(rows)
                elif hop == len(self.stages):
                    rows = self._by_rank(compute(self._by_expert(rows), keys_of[k]), rows.shape)
                chunks[k] = hops[hop].start(rows) if hop < len(hops) else self._returned(rows)
        return chunks[0] if n == 1 else torch.cat(chunks)

    def local(self, weight: Tensor) -> Tensor:
        """The e experts of this rank. The gradient is Shard(0) as the weight is: each rank's experts are its own."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def _arrived(self, keys: Int64[Tensor, "G E"]) -> Int64[Tensor, "e R G"]:
        """The keys that all ranks have for the local experts."""
        rows = self._outgoing(keys[..., None, None])
        for stage in self.stages:
            rows = stage.finish(stage.start(rows))
        return self._by_expert(rows).view(-1, self.R, len(keys))

    def _outgoing(self, slots: Shaped[Tensor, "g E S D"]) -> Shaped[Tensor, "... e g S D"]:
        # A view: the copy into the order of the wire is the one that `start` makes.
        return slots.transpose(0, 1).unflatten(0, (*self.axes, -1))

    def _by_expert(self, rows: Shaped[Tensor, "... e g S D"]) -> Shaped[Tensor, "e N D"]:
        e, g, S, D = rows.shape[-4:]
        return rows.reshape(self.R, e, g * S, D).transpose(0, 1).reshape(e, -1, D)

    def _by_rank(self, outputs: Float[Tensor, "e N D"], shape: torch.Size) -> Float[Tensor, "... e g S D"]:
        *axes, e, g, S, D = shape
        return outputs.view(e, *axes, g, S, D).movedim(0, len(axes))

    def _returned(self, rows: Float[Tensor, "... e g S D"]) -> Float[Tensor, "g E S D"]:
        # Not a view, which FSDP2 warns of: this is what a unit of experts returns.
        return rows.flatten(0, -4).transpose(0, 1).clone(memory_format=torch.contiguous_format)


class NarrowExchange:
    """Any exchange with fewer bytes: slots, results and their gradients cross it in `dtype`, and are computed in their own.

    The slots that stay on their rank are rounded too, and so are those of one process: numbers do not depend on the layout.
    """

    def __init__(self, exchange: SlotExchange, dtype: torch.dtype) -> None:
        self.exchange = exchange
        self.dtype = dtype

    def through(
        self, slots: Float[Tensor, "G E S D"], compute: Compute, keys: Int64[Tensor, "G E"] | None = None
    ) -> Float[Tensor, "G E S D"]:
        """Each of the four crossings (there, back, and both gradients) rounds once, to 2**-8 relative in bfloat16; keys stay whole."""
        wide = slots.dtype

        def narrow(rows: Tensor, keys: Tensor | None) -> Tensor:
            return compute(rows.to(wide), keys).to(self.dtype)

        return self.exchange.through(slots.to(self.dtype), narrow, keys).to(wide)

    def local(self, weight: Tensor) -> Tensor:
        """As of the exchange within."""
        return self.exchange.local(weight)


def build_exchange(config: ParallelConfig, topology: Topology) -> SlotExchange:
    """The exchange that the settings name, over the expert axis of `topology`; it holds no state, so all layers share one."""
    exchange: SlotExchange = LocalExchange()
    if topology.ep.size() > 1:
        exchange = AllToAllExchange(_stages(config, topology), config.exchange_chunks)
    return exchange if config.exchange_dtype is None else NarrowExchange(exchange, WIRE[config.exchange_dtype])


def _stages(config: ParallelConfig, topology: Topology) -> list[Stage]:
    """The all-to-alls of one way. Of two, the one inside the node goes first: it gathers what goes to each other node."""
    match config.exchange:
        case "flat":
            return [Stage(_own_group(topology.ep).group_name, topology.ep.size(), dim=0)]
        case "two_stage":
            assert topology.ep_stages is not None
            between, within = topology.ep_stages
            return [
                Stage(within.get_group().group_name, within.size(), dim=1),
                Stage(between.get_group().group_name, between.size(), dim=0),
            ]


def _own_group(ep: DeviceMesh) -> ProcessGroup:
    """The group of `ep`, or a new one where that is the default group of all ranks.

    There gradients are summed under backward; on a GPU a group is one queue, and the exchange, which backward waits for, would
    stand in it behind them.
    """
    group, everyone = ep.get_group(), dist.group.WORLD
    assert everyone is not None
    if group.group_name != everyone.group_name:
        return group
    own = dist.new_group()
    assert isinstance(own, ProcessGroup), own
    return own
