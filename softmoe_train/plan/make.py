"""This file owns a plan: all that is known of a run before it runs, and the same as plain values for programs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from softmoe_train.model.records import moe_blocks
from softmoe_train.parallel.layout import expert_axis
from softmoe_train.plan.axes import AxisCost, axis_costs
from softmoe_train.plan.cost import Cost, cost_of
from softmoe_train.plan.epoch import Epoch, epoch_of
from softmoe_train.plan.rehearsal import Rehearsed, rehearse
from softmoe_train.plan.tally import Collective
from softmoe_train.settings import RunConfig


class Traffic(NamedTuple):
    """All collectives of a step that are alike: their kind, and ranks and hosts of their groups."""

    kind: str
    ranks: int
    hosts: int
    calls: int
    given: int  # bytes handed to them
    off_rank: int  # bytes that leave the rank
    off_host: int | None  # of slots alone: what other collectives send between hosts is the library's choice


class Plan(NamedTuple):
    """What a run of `config` on `size` ranks costs."""

    config: RunConfig
    size: int
    ranks_per_host: int
    cost: Cost
    rehearsed: Rehearsed
    epoch: Epoch
    axes: list[AxisCost]

    @property
    def axis(self) -> int:
        """R, of the run."""
        return expert_axis(self.config.parallel, num_experts=self.config.model.num_experts, size=self.size)

    @property
    def layers(self) -> int:
        """The blocks that hold experts."""
        return len(moe_blocks(self.config.model.moe.blocks, self.config.model.depth))

    @property
    def images(self) -> int:
        """That the whole run sees."""
        return self.config.steps * self.config.batch_size

    @property
    def traffic(self) -> list[Traffic]:
        """Collectives of a step, slots first."""
        alike: dict[tuple[str, int, int], list[Collective]] = {}
        for one in self.rehearsed.collectives:
            alike.setdefault((one.kind, len(one.ranks), one.hosts(self.ranks_per_host)), []).append(one)
        return [self._sum(*key, ones) for key, ones in sorted(alike.items()) if key[1] > 1]

    @property
    def exchange(self) -> Traffic | None:
        """All exchanges of slots of a step together; None where nothing is exchanged."""
        slots = [t for t in self.traffic if t.kind == "all-to-all"]
        if not slots:
            return None
        ranks, hosts = max(t.ranks for t in slots), max(t.hosts for t in slots)
        calls, given, off_rank = (sum(getattr(t, field) for t in slots) for field in ("calls", "given", "off_rank"))
        return Traffic("all-to-all", ranks, hosts, calls, given, off_rank, sum(t.off_host or 0 for t in slots))

    def _sum(self, kind: str, ranks: int, hosts: int, ones: Iterable[Collective]) -> Traffic:
        ones = list(ones)
        off_host = sum(one.off_host(self.ranks_per_host) for one in ones)
        given, off_rank = sum(one.given for one in ones), sum(one.off_rank for one in ones)
        return Traffic(kind, ranks, hosts, len(ones), given, off_rank, off_host if kind == "all-to-all" else None)

    def document(self) -> dict[str, Any]:
        """For programs; bytes, FLOPs and counts, nothing rounded."""
        cost, rehearsed, exchange, batch = self.cost, self.rehearsed, self.exchange, self.config.batch_size
        held = rehearsed.held
        return {
            "run": self.config.as_saved(),
            "layout": {
                "ranks": self.size,
                "ranks_per_host": self.ranks_per_host,
                "expert_axis": self.axis,
                "images_per_rank": batch // self.size,
            },
            "model": {
                **cost._asdict(),
                "images": self.images,
                "training_exaflop": cost.training_flops * self.images / 1e18,
                "paper_training_exaflop": cost.paper_training_flops * self.images / 1e18,
            },
            "rank": {
                **held._asdict(),
                "activations": rehearsed.activations,
                "peak": rehearsed.peak,
            },
            "collectives": [t._asdict() for t in self.traffic],
            "exchange_per_layer": None
            if exchange is None
            else {k: getattr(exchange, k) // self.layers for k in ("calls", "given", "off_rank", "off_host")},
            "checkpoint": {"bytes": rehearsed.checkpoint, "mean_per_rank": rehearsed.checkpoint / self.size},
            "data": {**self.epoch._asdict(), "steps_per_epoch": self.epoch.steps(batch), "steps": self.config.steps},
            "axes": [axis._asdict() for axis in self.axes],
        }


def make_plan(config: RunConfig, size: int, ranks_per_host: int, *, axes: bool) -> Plan:
    """Plan a legal run; `axes` asks for the cost of every legal expert axis too."""
    plan = Plan(
        config,
        size,
        ranks_per_host,
        cost_of(config.model),
        rehearse(config, size, ranks_per_host),
        epoch_of(config),
        [],
    )
    if not axes or not plan.layers:
        return plan
    return plan._replace(axes=axis_costs(config, size, ranks_per_host, plan.rehearsed, plan.axis))
