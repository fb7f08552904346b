"""This file owns the bytes that the slot exchange moves: a formula, which tests hold against the collectives of real steps.

B images of a rank and step  E experts  S slots per expert  D width
R ranks of the expert axis = O nodes x I ranks on a node
"""

from dataclasses import dataclass
from typing import Literal

from softmoe_train.parallel.layout import ParallelConfig

PASSES = 2  # each exchange of forward has one of gradients in backward
WAYS = 2  # to the experts, and back
KEY_BYTES = 8  # what dropout is derived from, of a routing group and expert


@dataclass(frozen=True)
class ExchangeTraffic:
    """What one rank sends for one MoE layer in one step, forward and backward."""

    collectives: int  # all-to-alls that it takes part in
    handed_bytes: int  # given to them: what a counter of collectives sees, its own part included
    off_rank_bytes: int  # of these, what goes to another rank
    off_node_bytes: int  # of these, what goes to a rank on another node
    message_bytes: int  # the longest message from one rank to another on another node (flat: to any other rank)


def exchange_traffic(
    parallel: ParallelConfig,
    *,
    axis: int,
    on_node: int,
    images: int,
    micro_batches: int,
    num_experts: int,
    slots_per_expert: int,
    width: int,
    itemsize: int,
    expert_dropout: float,
) -> ExchangeTraffic:
    """The bytes of a layer, from B = `images` in `micro_batches` and slots of `itemsize` bytes.

    Where a routing group has several images, B counts groups, and S is the capacity of an expert for one.

    `axis` is R and `on_node` is I, which divides it (`layout.node_size`). `itemsize` is that of the activations;
    parallel.exchange_dtype=bfloat16 makes it 2.

    With P = B·E·S·D·itemsize, each of the 4 crossings (6 under parallel.recompute, whose backward runs the layer's forward again) hands P to one all-to-all, or P to each of two;
    a flat one sends (R - 1)/R of P off the rank, two stages (I - 1)/I and then (O - 1)/O; between nodes both send (O - 1)/O.
    Expert dropout sends 8 bytes for each routing group and expert with each forward of the layer, by the same route, and in one chunk.
    """
    R, I = axis, on_node  # noqa: E741
    assert R % I == 0 and images % micro_batches == 0 and num_experts % R == 0, locals()
    if R == 1:
        return ExchangeTraffic(0, 0, 0, 0, 0)
    O = R // I  # noqa: E741
    if parallel.exchange_dtype is not None:
        itemsize = 2
    image_bytes = num_experts * slots_per_expert * width * itemsize
    group = images // micro_batches
    chunks = min(parallel.exchange_chunks, group)
    recomputed = parallel.recompute != "none"
    crossings = WAYS * (PASSES + recomputed)
    keyed = (1 + recomputed) * (expert_dropout > 0)
    handed = crossings * images * image_bytes + keyed * images * num_experts * KEY_BYTES
    shares = _shares(parallel.exchange, R, I, O)
    return ExchangeTraffic(
        collectives=(crossings * chunks + keyed) * micro_batches * len(shares),
        handed_bytes=handed * len(shares),
        off_rank_bytes=sum(handed * (ranks - 1) // ranks for ranks in shares),
        off_node_bytes=handed * (O - 1) // O,
        message_bytes=-(-group // chunks) * image_bytes // shares[-1],
    )


def _shares(exchange: Literal["flat", "two_stage"], R: int, I: int, O: int) -> list[int]:  # noqa: E741
    """Among how many ranks each all-to-all of one way shares its bytes."""
    match exchange:
        case "flat":
            return [R]
        case "two_stage":
            return [I, O]
