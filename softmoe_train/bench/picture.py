"""This file owns the picture of `bench layer`: time, ratios and memory over the number of experts."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from softmoe_train.bench.layer import DENSE, FLOOR, OURS, LayerRow

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
PEERS = ("--", (0, (6, 1, 1, 1)), ":", (0, (1, 3)))  # each as it is, and with our router


def draw_layers(rows: list[LayerRow], path: str, sentence: str) -> None:
    """Write a PNG: a colour for each dtype and number of images, medians with their quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    (time, floor), (others, memory) = figure.subplots(2, 2)
    for colour, (name, line) in zip(_cycle(COLOURS), _lines(rows).items(), strict=False):
        experts = [row.shape.experts for row in line]
        _spread(time, experts, [row.timings.spread(OURS) for row in line], colour, name, scale=1e3)
        _spread(floor, experts, [row.timings.ratio(FLOOR, OURS) for row in line], colour, name)
        sides = [DENSE, *line[0].differences]
        for style, side in zip(_cycle(("-", *PEERS)), sides, strict=False):
            ratios = [row.timings.ratio(side, OURS).median for row in line]
            others.plot(experts, ratios, linestyle=style, color=colour, marker="o", markersize=4)
        _memory(memory, experts, line, colour)
    _finish(time, rows, "milliseconds", "Forward and backward of a layer", logarithmic=True)
    _finish(floor, rows, "products' time / layer's time", "Beside its bare matrix products: 1 is the floor")
    _finish(others, rows, "other's time / layer's time", "Beside others: above 1 the layer is faster", logarithmic=True)
    _finish(memory, rows, "MiB", "Memory", logarithmic=True)
    floor.set_ylim(0, max(1.1, 1.05 * floor.get_ylim()[1]))
    floor.axhline(1, color="black", linewidth=0.8)
    others.axhline(1, color="black", linewidth=0.8)
    time.legend(frameon=False)
    _legend(others, [DENSE, *rows[0].differences], ("-", *PEERS))
    _legend(memory, ["kept for backward", "its bound", "weights (float32)"], ("-", ":", "--"))
    shape = rows[0].shape
    figure.suptitle(
        f"Soft MoE layer, {shape.tokens} tokens, width {shape.width}, hidden {shape.hidden}, "
        f"{_slots(rows)} slots an image\n{sentence}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _lines(rows: list[LayerRow]) -> dict[str, list[LayerRow]]:
    """The rows of each dtype and number of images, by experts."""
    lines: dict[str, list[LayerRow]] = {}
    for row in sorted(rows, key=lambda row: row.shape.experts):
        lines.setdefault(f"{row.dtype}, {row.shape.images} images", []).append(row)
    return dict(sorted(lines.items(), key=lambda item: (item[1][0].dtype != "float32", item[1][0].shape.images)))


def _spread(axes: Any, experts: list[int], spreads: Iterable[Any], colour: str, name: str, scale: float = 1) -> None:
    low, median, high = zip(*[(scale * s.low, scale * s.median, scale * s.high) for s in spreads], strict=True)
    axes.plot(experts, median, color=colour, marker="o", markersize=4, label=name)
    axes.fill_between(experts, low, high, color=colour, alpha=0.15, linewidth=0)


def _memory(axes: Any, experts: list[int], line: list[LayerRow], colour: str) -> None:
    values: list[tuple[str, Callable[[LayerRow], float]]] = [
        ("-", lambda row: row.memory.saved),
        (":", lambda row: row.shape.saved_bound(getattr(torch, row.dtype))),
    ]
    for style, value in values:
        axes.plot(experts, [value(row) / 2**20 for row in line], style, color=colour, marker="o", markersize=4)
    axes.plot(experts, [4 * row.shape.parameters / 2**20 for row in line], "--", color="black", linewidth=1)


def _finish(axes: Any, rows: list[LayerRow], label: str, title: str, *, logarithmic: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    experts = sorted({row.shape.experts for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(experts, [str(number) for number in experts])
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("experts")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Any, names: list[str], styles: tuple[Any, ...]) -> None:
    """What the kinds of line mean; colours are told once, in the first panel."""
    handles = [
        axes.plot([], [], linestyle=style, color="black", label=name)[0]
        for name, style in zip(names, styles, strict=False)
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8)


def _slots(rows: list[LayerRow]) -> str:
    totals = sorted({row.shape.experts * row.shape.slots for row in rows})
    return " or ".join(map(str, totals))


def _cycle(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values * 50
