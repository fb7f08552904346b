"""This file owns the grid of `bench layer`: every shape in every dtype, as a table and as JSON."""

import torch

from softmoe_train.bench.layer import DENSE, FLOOR, OURS, LayerRow, measure_layer
from softmoe_train.bench.settings import LayerSettings
from softmoe_train.bench.table import Outcome, gigaflops, mebibytes, milliseconds, progress, ratio

QUIET = 0.75  # of the threads asked for; a quiet machine gives 0.9, since some operators run on one thread


def bench_layer(settings: LayerSettings, device: torch.device) -> tuple[Outcome, list[LayerRow]]:
    """Measure the grid."""
    cases = [(shape, dtype) for dtype in settings.dtype for shape in settings.shapes()]
    rows = []
    with progress(len(cases) * (settings.rounds + settings.warmup), shown=True) as advance:
        for shape, dtype in cases:
            name = f"{dtype} {shape.experts} x {shape.slots}, {shape.images} images"
            row = measure_layer(
                shape,
                dtype,
                device,
                rounds=settings.rounds,
                warmup=settings.warmup,
                peers=settings.peers,
                after=lambda name=name: advance(name),
            )
            rows.append(row)
    return outcome_of(rows, settings, device), rows


def outcome_of(rows: list[LayerRow], settings: LayerSettings, device: torch.device) -> Outcome:
    """The table of what was measured."""
    peers = list(dict.fromkeys(name for row in rows for name in row.differences))
    columns = ["dtype", "experts x slots", "images", "GFLOP", "layer ms", FLOOR, DENSE, *map(_in_lines, peers)]
    columns += ["saved MiB", "bound", "recomputed", "peak MiB", "weights MiB"]
    return Outcome(
        title=f"MoE layer, forward and backward: {settings.tokens} tokens, width {settings.width}, hidden {settings.hidden}",
        columns=columns,
        cells=[_cells(row, peers) for row in rows],
        notes=_notes(rows, peers, settings.rounds) + _busy_notes(rows, device),
        rows=[row.as_json() for row in rows],
    )


def _in_lines(peer: str) -> str:
    """A peer's name as a narrow heading."""
    return peer.replace(" + ", "\n+ ").replace("-of-", "-\nof-")


def _cells(row: LayerRow, peers: list[str]) -> list[str]:
    shape, timings = row.shape, row.timings
    return [
        row.dtype,
        f"{shape.experts} x {shape.slots}",
        str(shape.images),
        gigaflops(shape.flops),
        milliseconds(timings.spread(OURS)),
        *(ratio(timings.ratio(name, OURS)) for name in (FLOOR, DENSE, *peers)),
        mebibytes(row.memory.saved),
        mebibytes(shape.saved_bound(getattr(torch, row.dtype))),
        mebibytes(row.recomputed_bytes),
        mebibytes(row.memory.peak),
        mebibytes(4 * shape.parameters),
    ]


def _notes(rows: list[LayerRow], peers: list[str], rounds: int) -> list[str]:
    notes = [
        f"median (quartiles) of {rounds} interleaved rounds; a ratio is the other's time over the layer's, round by round",
        f"{FLOOR}: the bare matrix products of the layer into buffers that stay"
        + ("; below float32 also the bare activation" if any(row.dtype != "float32" for row in rows) else ""),
        f"{DENSE}: over all tokens, its hidden size ({', '.join(dict.fromkeys(str(row.dense_hidden) for row in rows))}) "
        "chosen for the same FLOPs",
        "saved: bytes that the forward keeps for its backward, the input included, parameters not; bound: 2 B s H + B (T + 2 s) D in "
        "the dtype and 2 B T s in float32, s slots an image; recomputed: what is kept under parallel.recompute=moe, the input",
    ]
    notes += [f"{name}: {rows[0].differences[name]}" for name in peers]
    extra = max(row.flops_executed / row.shape.flops - 1 for row in rows)
    if extra:
        notes.append(f"the layer executed up to {extra:.1%} more FLOPs than the products that it is compared with")
    if any(str(row.product) != f"torch.{row.dtype}" for row in rows):
        notes.append(
            "this processor cannot multiply bfloat16: the layer takes float32 for its products there, and so do the bare products, "
            "the dense MLP and the others"
        )
    return notes


def _busy_notes(rows: list[LayerRow], device: torch.device) -> list[str]:
    """A warning where other programs had much of the processor: ratios by the clock then say little."""
    share = min(row.timings.share(torch.get_num_threads()) for row in rows)
    if device.type != "cpu" or share > QUIET:
        return []
    pairs = [f"{row.dtype} {_name(row)} {ratio(row.timings.cpu_ratio(FLOOR, OURS))}" for row in rows]
    return [
        f"warning: this processor is busy, the benchmark got only {share:.0%} of the threads that it asked for; {FLOOR} by "
        f"processor time instead: {', '.join(pairs)}"
    ]


def _name(row: LayerRow) -> str:
    return f"{row.shape.experts} x {row.shape.slots}, {row.shape.images} images"
