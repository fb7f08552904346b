"""This file owns what a person sees of a plan: a page for one run, one comparison for several."""

import sys
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from softmoe_train.model.products import CPU_MULTIPLIES_BF16
from softmoe_train.plan.make import Plan
from softmoe_train.settings import TorchEngineConfig


def print_plan(plan: Plan) -> None:
    """One run: the model, one rank, what a step sends, and what else the axis could be."""
    print(f"{_title(plan)}\n")
    _print(["model", ""], [[name, value] for name, value in _model_rows(plan)])
    _print(["held by one rank", "bytes"], [[name, data(count)] for name, count in _rank_rows(plan)])
    if plan.traffic:
        _print(["a step's collectives", "over", "calls", "given", "leaves the rank"], _traffic_rows(plan))
    if len(plan.axes) > 1:
        _print(
            [
                "expert axis",
                "weights, gradients, optimizer",
                "slots leave the rank",
                "the host",
                "weights leave the rank",
            ],
            _axis_rows(plan),
        )
    print(*_notes(plan), sep="\n", flush=True)


def print_comparison(plans: Sequence[tuple[Sequence[str], Plan]]) -> None:
    """A line for each plan, beside the overrides that make it another than the rest."""
    keys = [override.partition("=")[0] for override in plans[0][0]]
    columns = ["parameters", "GFLOP/image", "exaFLOP (paper)", "lasting", "activations", "peak", "slots", "weights"]
    columns = [*(key.removeprefix("model.").removeprefix("parallel.") for key in keys), *columns, "checkpoint"]
    cells = [[*(override.partition("=")[2] for override in swept), *_compared(plan)] for swept, plan in plans]
    _print(columns, cells)
    print(
        "bytes of one rank: lasting is weights, gradients and optimizer; peak is the most of a step; slots and weights are what a step "
        "sends off the rank;\nexaFLOP as the paper counts training: one a multiply-add, times three, one-hot products of sparse routers "
        "included",
        flush=True,
    )


def data(count: float) -> str:
    """Bytes with three digits, in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"


def _title(plan: Plan) -> str:
    config, moe = plan.config, plan.config.model.moe
    experts = "no experts"
    if plan.layers:
        shape = f"{moe.num_experts} experts x {config.model.capacity} slots"
        shape += f" a group of {config.model.group_images} images" if config.model.group_images > 1 else ""
        experts = f"{moe.router}, {shape} in {plan.layers} of {config.model.depth} blocks"
    hosts = plan.size // plan.ranks_per_host
    ranks = "1 rank" if plan.size == 1 else f"{plan.size} ranks on {hosts} host{'' if hosts == 1 else 's'}"
    layout = f"expert axis {plan.axis}, {config.parallel.sharding}"
    if not isinstance(config.engine, TorchEngineConfig):
        layout = f"expert axis {plan.axis}, DeepSpeed ZeRO {config.engine.zero_stage}"
    images = config.batch_size // plan.size
    micro = "" if config.micro_batches == 1 else f" in {config.micro_batches} micro-batches"
    what = (
        f"{images} images a rank{micro}, {config.precision}, {config.optim.kind}, recompute {config.parallel.recompute}"
    )
    return f"{experts}, {config.model.num_tokens} tokens, width {config.model.width}\n{ranks}, {layout}; {what}"


def _model_rows(plan: Plan) -> list[tuple[str, str]]:
    cost, images = plan.cost, plan.images
    rows = [("parameters", f"{cost.parameters:,}")]
    if plan.layers:
        rows += [
            ("  of them in experts", f"{cost.expert_parameters:,}"),
            ("  active for an image", f"{cost.active_parameters:,}"),
            ("  slots for a token", f"{cost.slots_per_token:.3g}"),
        ]
    rows += [
        ("forward of an image (2 a multiply-add)", f"{cost.forward_flops / 1e9:,.4g} GFLOP"),
        (f"training on {images:,} images, as it runs (2)", f"{cost.training_flops * images / 1e18:,.4g} exaFLOP"),
        ("  as the paper counts it (1, times 3)", f"{cost.paper_training_flops * images / 1e18:,.4g} exaFLOP"),
    ]
    return rows


def _rank_rows(plan: Plan) -> list[tuple[str, int]]:
    held, rehearsed = plan.rehearsed.held, plan.rehearsed
    rows = [("weights", held.parameters), ("gradients", held.gradients), ("optimizer", held.optimizer)]
    rows += [("averaged weights", held.average)] if held.average else []
    rows += [("activations kept for backward", rehearsed.activations)]
    return [*rows, ("most at once in a step", rehearsed.peak)]


def _traffic_rows(plan: Plan) -> list[list[str]]:
    rows = []
    for t in plan.traffic:
        kind = f"{t.kind} (slots)" if t.kind == "all-to-all" else t.kind
        over = f"{t.ranks} ranks, {t.hosts} host{'' if t.hosts == 1 else 's'}"
        rows.append([kind, over, str(t.calls), data(t.given), data(t.off_rank)])
    return rows


def _axis_rows(plan: Plan) -> list[list[str]]:
    rows = []
    for cost in plan.axes:
        name = f"{cost.axis} (this run)" if cost.axis == plan.axis else str(cost.axis)
        costs = [c for c in (cost.lasting, cost.exchange, cost.off_host, cost.weights) if c is not None]
        rows.append([name, *(map(data, costs) if costs else ("not with this layout", "", "", ""))])
    return rows


def _notes(plan: Plan) -> list[str]:
    config, epoch, exchange = plan.config, plan.epoch, plan.exchange
    notes = []
    if exchange is not None:
        given, off_rank, off_host = (
            (n or 0) / plan.layers for n in (exchange.given, exchange.off_rank, exchange.off_host)
        )
        notes.append(
            f"exchange of one layer and step: {data(given)} given, {data(off_rank)} leave the rank, {data(off_host)} the host"
        )
    notes += [f"expert axis {cost.axis}: {cost.problem}" for cost in plan.axes if cost.problem is not None]
    size = plan.rehearsed.checkpoint
    notes.append(f"checkpoint: {data(size)}, {data(size / plan.size)} a rank on the mean")
    steps = epoch.steps(config.batch_size)
    if epoch.images is None or steps is None:
        notes.append(
            f"data: nothing is known of an epoch ({epoch.unknown}); {config.steps:,} steps of {config.batch_size:,} images"
        )
    else:
        shards = "" if epoch.shards is None else f" in {epoch.shards:,} shards"
        notes.append(
            f"data: {epoch.images:,} images{shards}, {steps:,.1f} steps an epoch, {config.steps / steps:,.2f} epochs in {config.steps:,} steps"
        )
    if not isinstance(config.engine, TorchEngineConfig) and config.engine.offload_optimizer:
        notes.append(
            "engine.offload_optimizer=true: planned without; the optimizer then lies in host memory, and so does ZeRO's part of gradients"
        )
    if config.compile:
        notes.append("compile=true: planned as it runs without")
    if config.precision == "bfloat16" and not CPU_MULTIPLIES_BF16:
        notes.append(
            "this processor has no bfloat16 products and makes them in float32: a GPU needs a little less at once"
        )
    notes.append("bytes are of tensors on rank 0; an allocator's slack and the buffers of NCCL and CUDA come on top")
    return notes


def _compared(plan: Plan) -> list[str]:
    rehearsed, slots = plan.rehearsed, plan.exchange
    sent = sum(t.off_rank for t in plan.traffic)
    by_slots = 0 if slots is None else slots.off_rank
    bytes_of = (rehearsed.held.lasting, rehearsed.activations, rehearsed.peak, by_slots, sent - by_slots)
    return [
        f"{plan.cost.parameters:,}",
        f"{plan.cost.forward_flops / 1e9:,.4g}",
        f"{plan.cost.paper_training_flops * plan.images / 1e18:,.4g}",
        *map(data, bytes_of),
        data(rehearsed.checkpoint),
    ]


def _print(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console = rich.console.Console(file=sys.stdout, width=1000, highlight=False)
    width = console.measure(table).maximum
    rich.console.Console(file=sys.stdout, width=max(width, 60), highlight=False).print(table)
    print()
