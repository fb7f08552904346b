"""What the normalisation of the logits is for (paper App. E): how sharp both weightings are, by width, at the start and after moves.

A program: `python -m tests.studies.normalisation [widths=96,192,384,768,1536] [tokens=64,256,1024] [steps=100] [seed=0]
[picture=normalisation.png] [table=normalisation.md]`. One process, no data. Tokens are the outputs of a LayerNorm of normal noise,
128 experts have a slot each. Three states: the start; every parameter of the router moved by 0.1 (the slot parameters by noise of
that deviation, the scale up), which is what Adam at the paper's 1e-3 does in a hundred steps one way, whatever the size of the
gradient; and `steps` real steps of Adam on a toy (one token of 64 tells the class; layer, mean, linear head).
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys, normal
from softmoe_train.model.moe import MoE, build_router
from softmoe_train.model.routing import Routing
from tests.models import moe_config
from tests.studies.options import options_of

IMAGES = 8  # that each number is a mean over
EXPERTS = 128
MOVE = 0.1
RATE = 1e-3  # of Adam, the paper's peak
TOY_TOKENS, TOY_EXPERTS, TOY_HIDDEN, TOY_BATCH, TOY_CLASSES = 64, 64, 64, 16, 10
CHOICES = {  # what model.moe.soft says
    "normalised": {},
    "normalised, no scale": {"scale": False},
    "not normalised": {"normalize": False},
    "not normalised, no scale": {"normalize": False, "scale": False},
}
COLOURS = dict(zip(CHOICES, ("#0072b2", "#56b4e9", "#d55e00", "#e69f00"), strict=True))


class Sharpness(NamedTuple):
    """Of one weighting: entropy over that of the uniform one, and the largest weight; means over slots or tokens, and images."""

    entropy: float
    largest: float


class Both(NamedTuple):
    dispatch: Sharpness
    combine: Sharpness


class Point(NamedTuple):
    """A step of training: how sharp the router is, and the share of the toy's fresh images that are classified rightly."""

    step: int
    sharp: Both
    right: float


def sharpness(weights: Tensor) -> Sharpness:
    """Of distributions along the last dim."""
    entropy = torch.special.entr(weights).sum(-1).mean() / math.log(weights.shape[-1])
    return Sharpness(entropy.item(), weights.amax(-1).mean().item())


def both(routing: Routing) -> Both:
    """Of dispatch over the tokens of an image, and of combine over all slots."""
    return Both(sharpness(routing.dispatch.flatten(2).mT), sharpness(routing.combine.flatten(2)))


def noise(seed: int, *shape: int) -> Tensor:
    """Normal numbers by (seed, row, place)."""
    return normal(image_keys(seed, torch.arange(shape[0])), shape[1:])


@torch.no_grad()
def of_router(width: int, tokens: int, choice: str, moved: bool, seed: int) -> Both:
    """A router at its start, or moved."""
    router = build_router(moe_config(num_experts=EXPERTS, slots_per_expert=1, soft=CHOICES[choice]), width)
    initialize(router, seed)
    for name, p in router.named_parameters():
        if moved:
            p.add_(MOVE if name == "scale" else MOVE * noise(seed + 1, *p.shape))
    return both(router(F.layer_norm(noise(seed + 2, IMAGES, tokens, width), [width])))


def toy(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of noise, of which one in each image lies half towards the direction of its class; and the classes."""
    directions, x = noise(0, TOY_CLASSES, width), noise(seed, TOY_BATCH, TOY_TOKENS, width)
    labels = torch.arange(TOY_BATCH) % TOY_CLASSES
    place = torch.arange(TOY_BATCH) * 5 % TOY_TOKENS
    x[torch.arange(TOY_BATCH), place] += directions[labels]
    return F.layer_norm(x, [width]), labels


def training(width: int, choice: str, steps: int, seed: int) -> Iterator[Point]:
    """Points of a layer that learns the toy, before the first step and ten times evenly after it."""
    config = moe_config(
        num_experts=TOY_EXPERTS, slots_per_expert=1, expert_init="independent", soft=CHOICES[choice], blocks=[0]
    )
    layer, head = MoE(config, width, TOY_HIDDEN), nn.Linear(width, TOY_CLASSES)
    initialize(layer, seed)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=RATE)
    fresh, classes = toy(width, seed + 10**6)
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                right = (head(layer(fresh)[0].mean(1)).argmax(-1) == classes).float().mean().item()
                yield Point(step, both(layer.router(fresh)), right)
        x, labels = toy(width, seed + 10 + step)
        optimizer.zero_grad()
        F.cross_entropy(head(layer(x)[0].mean(1)), labels).backward()
        optimizer.step()


class Study(NamedTuple):
    """Sharpness by (moved, choice, width, tokens); points by (choice, width)."""

    routers: dict[tuple[bool, str, int, int], Both]
    trained: dict[tuple[str, int], list[Point]]


def study(widths: list[int], tokens: list[int], steps: int, seed: int) -> Study:
    """Everything, under a bar."""
    cases = [(moved, c, w, t) for moved in (False, True) for c in CHOICES for w in widths for t in tokens]
    runs = [(choice, width) for choice in CHOICES for width in widths]
    found = Study({}, {})
    with Progress() as progress:
        bar = progress.add_task("routers at the start and moved", total=len(cases))
        for moved, choice, width, count in cases:
            found.routers[moved, choice, width, count] = of_router(width, count, choice, moved, seed)
            progress.advance(bar)
        bar = progress.add_task("steps of Adam", total=sum(width for _, width in runs))
        for choice, width in runs:
            found.trained[choice, width] = list(training(width, choice, steps, seed))
            progress.advance(bar, width)
    return found


def table(found: Study, widths: list[int], tokens: list[int]) -> list[str]:
    """Three tables in Markdown."""
    pair = ("normalised", "not normalised")
    lines = []
    for moved, title in ((False, "At the start"), (True, f"Every parameter of the router moved by {MOVE:g}")):
        lines += [
            f"{title}: normalised / not.",
            "",
            "| width | tokens | dispatch: entropy | largest | combine: entropy | largest |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for width, count in [(w, t) for w in widths for t in tokens]:
            cells = [
                " / ".join(f"{getattr(getattr(found.routers[moved, c, width, count], which), what):.4f}" for c in pair)
                for which in Both._fields
                for what in Sharpness._fields
            ]
            lines += [f"| {width} | {count} | {' | '.join(cells)} |"]
        lines += [""]
    steps = found.trained[pair[0], widths[0]][-1].step
    lines += [
        f"After {steps} steps of Adam on the toy: largest dispatch weight, largest combine weight, share classified rightly.",
        "",
    ]
    lines += [f"| width | {' | '.join(CHOICES)} |", "|---" * (len(CHOICES) + 1) + "|"]
    for width in widths:
        last = [found.trained[choice, width][-1] for choice in CHOICES]
        cells = [f"{p.sharp.dispatch.largest:.3f}, {p.sharp.combine.largest:.3f}, {p.right:.2f}" for p in last]
        lines += [f"| {width} | {' | '.join(cells)} |"]
    return lines


def draw(found: Study, widths: list[int], tokens: list[int], path: str) -> None:
    """Write a PNG: a row for the start, one for moved routers, one for training; both measures on scales whose top is one-hot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 4, sharex=True, sharey="col")
    markers = dict(zip(tokens, "osD^v", strict=False))
    for row, moved in enumerate((False, True)):
        for choice in list(CHOICES)[::2]:  # a scale of 1, or 1.1, is not seen here
            for count in tokens:
                line = [found.routers[moved, choice, width, count] for width in widths]
                style = {"color": COLOURS[choice], "marker": markers[count], "label": f"{choice}, {count} tokens"}
                _plot(panels[row], widths, line, **style, markersize=5)
    for choice in CHOICES:
        line = [found.trained[choice, width][-1].sharp for width in widths]
        style = {"color": COLOURS[choice], "linestyle": "--" if "no scale" in choice else "-", "label": choice}
        _plot(panels[2], widths, line, **style, marker="*", markersize=8)
    steps = next(iter(found.trained.values()))[-1].step
    rows = ("at the start", f"router moved by {MOVE:g}", f"{steps} steps of Adam, {TOY_TOKENS} tokens")
    for axes, name in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(name, fontsize=13)
    for axes, which in zip(panels[0], Both._fields * 2, strict=True):
        what = "1 - entropy / that of uniform" if axes in panels[0][:2] else "largest weight, mean"
        axes.set_title(f"{which}: {what}", fontsize=12)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    for axes in panels[2]:
        axes.set_xlabel("width (the grey line is one-hot)")
    for axes, place in ((panels[0][0], "upper"), (panels[2][0], "lower")):
        figure.legend(*axes.get_legend_handles_labels(), loc=f"outside {place} center", ncols=len(tokens) if place == "upper" else 4, frameon=False)  # fmt: skip
    figure.savefig(path, dpi=90)


def _plot(axes: Any, widths: list[int], line: list[Both], **style: Any) -> None:
    """A line in the four panels of a row: missing entropy of dispatch and combine, then their largest weights."""
    measured = [1 - side.entropy for both in line for side in both], [side.largest for both in line for side in both]
    for panel, values in zip(axes, (v[i::2] for v in measured for i in (0, 1)), strict=True):
        panel.plot(widths, values, **style)


def main(words: list[str]) -> int:
    """The study as a program."""
    options = {"widths": "96,192,384,768,1536", "tokens": "64,256,1024", "steps": "100", "seed": "0"}
    options = options_of(words, {**options, "picture": "normalisation.png", "table": "normalisation.md"})
    widths, tokens = ([int(n) for n in options[key].split(",")] for key in ("widths", "tokens"))
    found = study(widths, tokens, int(options["steps"]), int(options["seed"]))
    lines = table(found, widths, tokens)
    Path(options["table"]).write_text("\n".join(lines) + "\n")
    draw(found, widths, tokens, options["picture"])
    print("\n".join([*lines, "", f"picture: {options['picture']}"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
