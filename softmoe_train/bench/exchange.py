"""This file owns `bench exchange`: a MoE layer's slot exchange beside the bare collective of the same slots.

G images of a rank  E experts  S slots per expert  D width  R expert ranks
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from softmoe_train.bench.exchange_clock import moe_layers
from softmoe_train.bench.rounds import Side, Spread, Timings, measure, no_reset
from softmoe_train.bench.settings import ExchangeSettings, Measuring, group_problems
from softmoe_train.bench.table import Outcome, mebibytes, milliseconds, progress, ratio
from softmoe_train.dist import World
from softmoe_train.model.moe import SlotExchange
from softmoe_train.parallel.exchange import WIRE
from softmoe_train.parallel.layout import expert_axis
from softmoe_train.parallel.topology import Topology
from softmoe_train.parallel.traffic import exchange_traffic
from softmoe_train.run import DTYPES, build_engine, build_topology
from softmoe_train.settings import RunConfig

FORWARD, BARE_FORWARD, BOTH, BARE_BOTH = "forward", "bare forward", "both", "bare both"


class ExchangeRow(NamedTuple):
    """What was measured of one number of images."""

    images: int
    slots_bytes: int  # of this rank, as they travel
    sent_bytes: int  # by this rank to others, forward and backward
    bare_sent_bytes: int  # the same of the bare collective, which goes straight: two stages send some slots twice
    timings: Timings


def exchange_problems(own: Measuring | None, config: RunConfig, size: int) -> list[str]:
    """Why nothing would travel, or parts of a routing group."""
    R = expert_axis(config.parallel, num_experts=config.model.num_experts, size=size)
    if R > 1:
        return group_problems(own, config.model.group_images)
    if not config.model.has_experts:
        return [
            "model has no experts (model.moe.blocks=[]), so there are no slots to exchange; choose one that has, as model=soft_s16_128e"
        ]
    return [
        f"parallel.expert_axis={config.parallel.expert_axis} on {size} {'rank' if size == 1 else 'ranks'} with "
        f"{config.model.num_experts} experts: no slot travels; use processes=2 or more and an axis above 1"
    ]


def bench_exchange(settings: ExchangeSettings, config: RunConfig, world: World, device: torch.device) -> Outcome:
    """Measure on every rank of the default process group."""
    topology = build_topology(config, world, device)
    exchange = _exchange(config, topology, device)
    rows = []
    with progress(len(settings.images) * (settings.rounds + settings.warmup), shown=world.main) as advance:
        for images in settings.images:
            sides, size = _sides(config, exchange, topology.ep.get_group(), images, device)
            timings = measure(
                sides,
                device=device,
                rounds=settings.rounds,
                warmup=settings.warmup,
                ready=dist.barrier,
                after=lambda images=images: advance(f"{images} images"),
            )
            sent, bare = (_sent(config, topology, images, route) for route in (config.parallel.exchange, "flat"))
            rows.append(ExchangeRow(images, size, sent, bare, timings))
    return _outcome(rows, settings, config, topology)


def _sent(config: RunConfig, topology: Topology, images: int, route: str) -> int:
    """Bytes that leave a rank, forward and backward of one layer."""
    moe, R = config.model.moe, topology.ep.size()
    traffic = exchange_traffic(
        config.parallel.model_copy(update={"recompute": "none", "exchange": route}),
        axis=R,
        on_node=topology.ep_stages[1].size() if topology.ep_stages else R,
        images=images // moe.group_images,
        micro_batches=1,
        num_experts=moe.num_experts,
        slots_per_expert=config.model.capacity,
        width=config.model.width,
        itemsize=DTYPES[config.precision].itemsize,
        expert_dropout=0.0,  # slots alone are timed
    )
    return traffic.off_rank_bytes


def _exchange(config: RunConfig, topology: Topology, device: torch.device) -> SlotExchange:
    """The exchange as the run's own assembly makes it, of a model with one block."""
    moe = config.model.moe.model_copy(update={"blocks": [0]})
    small = config.model.model_copy(update={"moe": moe, "depth": 1})
    engine = build_engine(config.model_copy(update={"model": small}), topology, device)
    return moe_layers(engine.module)[0].exchange


def _sides(
    config: RunConfig, exchange: SlotExchange, group: ProcessGroup, images: int, device: torch.device
) -> tuple[list[Side], int]:
    """Ours and the bare one, forward alone and with backward; and the bytes of the slots."""
    moe, dtype = config.model.moe, DTYPES[config.precision]
    wire = dtype if config.parallel.exchange_dtype is None else WIRE[config.parallel.exchange_dtype]
    sizes = (images // moe.group_images, moe.num_experts, config.model.capacity, config.model.width)
    slots = torch.randn(sizes, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn_like(slots)
    sent, received = torch.randn(slots.numel(), device=device).to(wire), torch.empty(slots.numel(), dtype=wire, device=device)  # fmt: skip

    def forward() -> Tensor:
        with torch.no_grad():
            return exchange.through(slots, lambda rows, _: rows)

    def both() -> None:
        exchange.through(slots, lambda rows, _: rows).backward(gradient)

    def forget() -> None:
        slots.grad = None

    def bare(times: int) -> None:
        for _ in range(times):
            dist.all_to_all_single(received, sent, group=group)

    sides = [
        Side(FORWARD, forward, no_reset),
        Side(BARE_FORWARD, lambda: bare(2), no_reset),
        Side(BARE_BOTH, lambda: bare(4), no_reset),
        Side(BOTH, both, forget),
    ]
    return sides, sent.numel() * sent.element_size()


def _outcome(rows: list[ExchangeRow], settings: ExchangeSettings, config: RunConfig, topology: Topology) -> Outcome:
    R = topology.ep.size()
    moe = config.model.moe
    return Outcome(
        title=f"slot exchange over {R} expert ranks: {moe.num_experts} experts x {config.model.capacity} slots, width "
        f"{config.model.width}, {config.precision}",
        columns=[
            "images a rank",
            "MiB sent",
            "forward ms",
            "bare / ours",
            "both ms",
            "bare / ours",
            "MiB/s",
            "bare MiB/s",
        ],
        cells=[_cells(row) for row in rows],
        notes=[
            f"rank 0's median (quartiles) of {settings.rounds} interleaved rounds; bare / ours: 1 is the speed of the collective",
            "forward: to the experts and back; both: the same for the gradients too; MiB sent: by a rank to others, both",
            "bare: one all_to_all_single of the same slots a crossing, into a buffer that stays; ours also orders slots by expert",
            *_stage_notes(rows),
        ],
        rows=[_json(row, R) for row in rows],
    )


def _stage_notes(rows: list[ExchangeRow]) -> list[str]:
    """That the two sides do not send as much, where they do not."""
    more = rows[0].sent_bytes / rows[0].bare_sent_bytes
    return (
        []
        if more == 1
        else [f"two stages send {more:.2f} times what the bare collective does; MiB/s are of each side's own"]
    )


def _speeds(row: ExchangeRow) -> dict[str, float]:
    """Bytes a second that each side sends to other ranks."""
    sent = {BOTH: row.sent_bytes, BARE_BOTH: row.bare_sent_bytes}
    return {name: count / row.timings.spread(name).median for name, count in sent.items()}


def _cells(row: ExchangeRow) -> list[str]:
    timings = row.timings
    return [
        str(row.images),
        mebibytes(row.sent_bytes),
        milliseconds(timings.spread(FORWARD)),
        ratio(timings.ratio(BARE_FORWARD, FORWARD)),
        milliseconds(timings.spread(BOTH)),
        ratio(timings.ratio(BARE_BOTH, BOTH)),
        *(f"{speed / 2**20:,.0f}" for speed in _speeds(row).values()),
    ]


def _json(row: ExchangeRow, R: int) -> dict[str, object]:
    timings = row.timings
    ratios: dict[str, Spread] = {
        "forward": timings.ratio(BARE_FORWARD, FORWARD),
        "both": timings.ratio(BARE_BOTH, BOTH),
    }
    return {
        "images": row.images,
        "expert_axis": R,
        "slots_bytes": row.slots_bytes,
        "sent_bytes": row.sent_bytes,
        "bare_sent_bytes": row.bare_sent_bytes,
        "seconds": {name: timings.spread(name)._asdict() for name in timings.seconds},
        "ratios": {name: spread._asdict() for name, spread in ratios.items()},
        "bytes_per_second": _speeds(row),
        "seconds_of_rounds": timings.seconds,
    }
