"""A dense ViT upcycled to Soft MoE on CIFAR-10 shards: held-out curves beside the dense run continued and Soft MoE from scratch.

A program: `python -m tests.studies.upcycle data=FOLDER [steps=400] [more=300] [seed=0] [out=upcycle.json] [picture=upcycle.png]`. The
folder holds cifar10-train-*.tar and cifar10-test-*.tar. One process; what it trains goes into a folder of its own and is deleted.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.studies.options import options_of, say

DENSE, SOFT = ["model.moe.blocks=[]"], ["model.moe.expert_init=independent"]
WARM = ["warm=weights", "warm.source={dense}"]
RUNS = {  # what goes on, or begins, for `more` steps after the dense run
    "dense, continued": [*DENSE, *WARM],
    "soft from dense, copies": [*SOFT, *WARM],
    "soft from dense, copies with noise 0.1": [*SOFT, *WARM, "warm.noise=0.1"],
    "soft from scratch": SOFT,
}
POINTS = 4  # measured of each run, evenly
Curve = list[tuple[int, float, float]]  # step, held-out loss, held-out top-1


def trained(folder: Path, data: str, steps: int, seed: int, *overrides: str) -> Curve:
    """Train in `folder` and return what was measured on the held-out images."""
    config = compose(
        RunConfig,
        [
            "recipe=cifar10", f"data.train={data}/cifar10-train-{{000000..000001}}.tar", f"data.test={data}/cifar10-test-*.tar",
            f"run_dir={folder}", "processes=1", "parallel.expert_axis=1", f"steps={steps}", f"seed={seed}", "schedule.peak=1e-3",
            f"schedule.warmup_steps={min(20, steps - 1)}", "checkpoint.every=0", f"observe.every={steps}",
            f"evals.upstream.every={max(1, steps // POINTS)}", "observe.wandb.mode=disabled", "observe.progress=off", *overrides,
        ],
        lambda c: check(c, 1, 1),
    )  # fmt: skip
    assert train(config, World(0, 1, 0, 1)) == "complete"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["upstream/test/loss"], line["upstream/test/top1"])
        for line in lines
        if "upstream/test/loss" in line
    ]


def study(folder: Path, data: str, steps: int, more: int, seed: int) -> dict[str, Curve]:
    """The curve of the dense run, and of each run after it; their point at step 0 is measured after a step of no length."""
    curves = {"dense": trained(folder / "dense", data, steps, seed, *DENSE)}
    say(told("dense", curves["dense"]))
    for number, (name, overrides) in enumerate(RUNS.items()):
        words = [word.format(dense=folder / "dense") for word in overrides]
        ((_, loss, top1),) = trained(folder / f"{number}_start", data, 1, seed, *words, "schedule.peak=1e-12")
        curves[name] = [(0, loss, top1), *trained(folder / str(number), data, more, seed, *words)]
        say(told(name, curves[name]))
    return curves


def told(name: str, curve: Curve) -> str:
    """A curve in a line."""
    return f"{name:<40} " + "  ".join(f"{step}: {loss:.3f} {100 * top1:.1f} %" for step, loss, top1 in curve)


def table(curves: dict[str, Curve]) -> list[str]:
    """Held-out loss and top-1 by further step, as Markdown."""
    steps = [step for step, _, _ in curves[next(iter(RUNS))]]
    lines = [f"| after | {' | '.join(f'{step} steps' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for name in RUNS:
        cells = " | ".join(f"{loss:.3f}, {100 * top1:.1f} %" for _, loss, top1 in curves[name])
        lines += [f"| {name} | {cells} |"]
    return lines


def draw(curves: dict[str, Curve], steps: int, path: str) -> None:
    """Write a PNG of both measures over the steps of the dense run and those after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    colours = dict(zip(curves, ("#000000", "#0072b2", "#d55e00", "#56b4e9", "#009e73")))
    for measure, (axes, what) in enumerate(zip(panels, ("held-out loss", "held-out top-1")), start=1):
        for name, curve in curves.items():
            begin = 0 if name == "dense" else steps
            at, values = [begin + point[0] for point in curve], [point[measure] for point in curve]
            style = "--" if "noise" in name else "-"  # it may lie on the curve without
            axes.plot(at, values, color=colours[name], linestyle=style, marker="o", markersize=4, label=name)
        axes.axvline(steps, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("step (runs after the dense one begin at the dotted line)")
        axes.set_title(what)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main(words: list[str]) -> int:
    """The study as a program."""
    known = {"data": "", "steps": "400", "more": "300", "seed": "0", "out": "", "picture": "upcycle.png"}
    options = options_of(words, known)
    if not options["data"]:
        say("data=FOLDER is needed: where cifar10-train-*.tar and cifar10-test-*.tar lie")
        return 2
    steps, more, folder = int(options["steps"]), int(options["more"]), Path(tempfile.mkdtemp(prefix="upcycle_"))
    try:
        curves = study(folder, options["data"], steps, more, int(options["seed"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options["out"]:
        Path(options["out"]).write_text(json.dumps({**options, "curves": curves}, indent=1))
    draw(curves, steps, options["picture"])
    say("\n".join(["", *table(curves), "", f"picture: {options['picture']}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
