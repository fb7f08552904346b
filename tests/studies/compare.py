"""Dense ViT, both sparse routers, Soft MoE and its ablations at matched FLOPs on CIFAR-10 shards: one table, one picture.

A program: `python -m tests.studies.compare data=FOLDER out=FOLDER [seeds=3] [jobs=2] [variants=Uniform,Identity] [override ...]`. The folder `data` holds cifar10-train-*.tar
and cifar10-test-*.tar. Each run is `softmoe train recipe=compare` with one thread, `jobs` at a time, in a folder of its own under `out`; a run that is complete
is not repeated, one that was interrupted goes on. Into `out` go compare.md, compare.png and compare.json. Overrides go to every run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from softmoe_train.config import compose
from softmoe_train.model.count import forward_flops
from softmoe_train.observe.console import start_bar
from softmoe_train.settings import RunConfig, check
from tests.studies.options import say

VARIANTS = {
    "dense ViT": ["model.moe.blocks=[]"],
    "Tokens Choice": ["model.moe.router=tokens_choice", "model.moe.sparse.group_images=8"],
    "Experts Choice": ["model.moe.router=experts_choice"],
    "Soft MoE": [],
    "Soft / Uniform": ["model.moe.soft.combine=uniform"],
    "Uniform / Soft": ["model.moe.soft.dispatch=uniform"],
    "Uniform": ["model.moe.soft.dispatch=uniform", "model.moe.soft.combine=uniform"],
    "Identity": ["model.moe.router=identity"],
    "not normalised": ["model.moe.soft.normalize=false"],
    "separate combine": ["model.moe.soft.combine=separate"],
}
FAMILIES = {  # the panels of curves
    "routers": ["dense ViT", "Tokens Choice", "Experts Choice", "Soft MoE"],
    "ablations of Soft MoE": ["Soft MoE", *list(VARIANTS)[4:]],
}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c564b", "#b5a800")
LATE = 0.1  # the last part of a run, over whose reports training measures are averaged


class Run(NamedTuple):
    """One training: what it is, and where."""

    variant: str
    seed: int
    config: RunConfig
    overrides: list[str]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.folder

    @property
    def complete(self) -> bool:
        """Whether it came to its end."""
        try:
            return json.loads((self.folder / "summary.json").read_text())["ended"] == "complete"
        except (OSError, ValueError):
            return False

    def lines(self) -> list[dict[str, float]]:
        """What it has reported so far."""
        try:
            return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):  # not begun, or in the middle of a line
            return []

    def late(self, measure: str) -> float | None:
        """The mean of a training measure over the last reports, and over the blocks that have it; None where none has."""
        values = [
            value
            for line in self.lines()
            if line["step"] > (1 - LATE) * self.config.steps
            for name, value in line.items()
            if name == measure or (name.startswith("router/") and name.endswith(f"/{measure}"))
        ]
        return fmean(values) if values else None


class Row(NamedTuple):
    """One variant over its seeds; lists hold one value a seed."""

    variant: str
    gflop: float  # forward, of an image
    top1: list[float]
    train_loss: list[float]
    dropped: float | None
    empty: float | None
    images_per_second: float
    curves: list[list[tuple[int, float]]]  # step and held-out loss


def planned(out: Path, variants: Collection[str], seeds: int, overrides: list[str]) -> list[Run]:
    """Every run of the study, seed by seed, checked: one of other settings in its folder is a ValueError, as for any run."""
    runs = []
    for seed in range(seeds):
        for variant in variants:
            folder = out / variant.replace(" / ", "_").replace(" ", "_").lower() / f"seed{seed}"
            words = ["recipe=compare", *overrides, *VARIANTS[variant], f"seed={seed}", f"run_dir={folder}"]
            config = compose(RunConfig, words, lambda c: check(c, 1, 1))
            runs.append(Run(variant, seed, config, words))
    return runs


def train_all(runs: list[Run], jobs: int) -> None:
    """Train what is not complete, `jobs` at a time, under one bar; raises RuntimeError with what a run that failed said."""
    left = [run for run in runs if not run.complete]
    say(f"{len(runs)} runs of {runs[0].config.steps} steps, {len(runs) - len(left)} complete already")
    total = sum(run.config.steps for run in runs)
    with ThreadPoolExecutor(jobs) as pool, start_bar(sys.stdout) as bar:
        task = bar.add_task("", total=total, completed=total if not left else 0, facts="steps")
        begun = {pool.submit(train, run): run for run in left}
        try:
            for done in _as_they_end(begun):
                steps = sum(int(lines[-1]["step"]) for run in runs if (lines := run.lines()))
                complete = sum(run.complete for run in runs)
                bar.update(task, completed=steps, facts=f"steps, {complete} of {len(runs)} runs")
                bar.refresh()
                for future in done:
                    future.result()
                    say(told(begun[future]))
        finally:  # after a failure or Ctrl-C those that run end by themselves, no other begins
            pool.shutdown(cancel_futures=True)


def _as_they_end(futures: dict[Future[None], Run]) -> Iterator[set[Future[None]]]:
    """Every two seconds, and at the end, which have ended since the last time."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=2, return_when=FIRST_EXCEPTION)
        yield done


def train(run: Run) -> None:
    """Train it with the real command, in a process of one thread."""
    quiet = ["observe.wandb.mode=disabled", "observe.progress=off"]
    done = subprocess.run(
        [sys.executable, "-m", "softmoe_train", "train", *run.overrides, *quiet],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{run.folder} ended with {done.returncode}: {done.stdout}{done.stderr}")


def told(run: Run) -> str:
    """A run in a line."""
    last = json.loads((run.folder / "summary.json").read_text())
    top1 = last["metrics"]["upstream/test/top1"]
    return f"{run.variant}, seed {run.seed}: top-1 {100 * top1:.1f} %, {last['wall_seconds']:.0f} s"


def row_of(variant: str, runs: list[Run]) -> Row:
    """What the runs of one variant came to."""
    curves = [
        [(int(x["step"]), x["upstream/test/loss"]) for x in run.lines() if "upstream/test/loss" in x] for run in runs
    ]
    speeds = [x["perf/images_per_second"] for run in runs for x in run.lines() if "perf/images_per_second" in x]
    heard = {
        measure: [v for run in runs if (v := run.late(measure)) is not None]
        for measure in ("dropped_tokens", "empty_slots")
    }
    return Row(
        variant=variant,
        gflop=forward_flops(runs[0].config.model) / 1e9,
        top1=[[x["upstream/test/top1"] for x in run.lines() if "upstream/test/top1" in x][-1] for run in runs],
        train_loss=[run.late("train/loss") or 0.0 for run in runs],
        dropped=fmean(heard["dropped_tokens"]) if heard["dropped_tokens"] else None,
        empty=fmean(heard["empty_slots"]) if heard["empty_slots"] else None,
        images_per_second=median(speeds),
        curves=curves,
    )


def table(rows: list[Row]) -> str:
    """The study as Markdown: means over the seeds, and in brackets the lowest and highest."""
    head = ["", "GFLOP an image", "top-1 %", "training loss", "dropped tokens %", "empty slots %", "images/s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row.variant, f"{row.gflop:.5f}", spread([100 * value for value in row.top1], 1), spread(row.train_loss, 3),
            share(row.dropped), share(row.empty), f"{row.images_per_second:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    seeds = f"Means over the seeds ({len(rows[0].top1)}), in brackets the lowest and the highest. "
    late = f"Training loss, dropped tokens and empty slots are means over the last {100 * LATE:.0f} % of training; "
    return "\n".join(
        [*lines, "", seeds + late + "a dash is where nothing can be dropped or empty; images/s of one thread."]
    )


def spread(values: list[float], digits: int) -> str:
    """Mean, and lowest to highest."""
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def share(value: float | None) -> str:
    """In percent."""
    return "-" if value is None else f"{100 * value:.1f}"


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: held-out loss over steps as mean and range of the seeds, and every seed's top-1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    colours = dict(zip(VARIANTS, COLOURS))
    for axes, (family, members) in zip(panels, FAMILIES.items()):
        for row in (row for row in rows if row.variant in members):
            steps = [step for step, _ in row.curves[0]]
            at = list(zip(*([loss for _, loss in curve] for curve in row.curves)))
            axes.plot(steps, [fmean(losses) for losses in at], color=colours[row.variant], label=row.variant)
            axes.fill_between(steps, *zip(*((min(x), max(x)) for x in at)), color=colours[row.variant], alpha=0.12)
        axes.set_title(f"held-out loss: {family}")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    panels[1].sharey(panels[0])
    for place, row in enumerate(reversed(rows)):
        panels[2].plot([100 * v for v in row.top1], [place] * len(row.top1), "o", color=colours[row.variant], alpha=0.6)
        panels[2].plot([100 * fmean(row.top1)], [place], "|", color=colours[row.variant], markersize=22)
    panels[2].set_yticks(range(len(rows)), [f"{row.variant} ({row.gflop:.5f} GFLOP)" for row in reversed(rows)])
    panels[2].set_title("held-out top-1 %: every seed, and the mean")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def study(out: Path, variants: Collection[str], seeds: int, jobs: int, overrides: list[str]) -> list[Row]:
    """Train what is missing; the rows of the table, which is written with the picture."""
    runs = planned(out, variants, seeds, overrides)
    train_all(runs, jobs)
    rows = [row_of(variant, [run for run in runs if run.variant == variant]) for variant in variants]
    (out / "compare.json").write_text(json.dumps([row._asdict() for row in rows], indent=1))
    (out / "compare.md").write_text(table(rows) + "\n")
    draw(rows, out / "compare.png")
    return rows


def main(words: list[str]) -> int:
    """The study as a program."""
    options = {"data": "", "out": "", "seeds": "3", "jobs": "2", "variants": ",".join(VARIANTS)}
    given = dict(word.split("=", 1) for word in words)
    options |= {key: given.pop(key) for key in options if key in given}
    if not options["data"] or not options["out"]:
        say(
            "data=FOLDER (with cifar10-train-*.tar and cifar10-test-*.tar, or data=synthetic) and out=FOLDER are needed"
        )
        return 2
    shards = [f"data.{part}={options['data']}/cifar10-{part}-*.tar" for part in ("train", "test")]
    overrides = ["data=synthetic"] if options["data"] == "synthetic" else shards
    overrides += [f"{key}={value}" for key, value in given.items()]
    out, variants = Path(options["out"]), options["variants"].split(",")
    if unknown := set(variants) - set(VARIANTS):
        say(f"variants={options['variants']}: there is no {', '.join(unknown)}; use some of {','.join(VARIANTS)}")
        return 2
    try:
        rows = study(out, variants, int(options["seeds"]), int(options["jobs"]), overrides)
    except (RuntimeError, ValueError) as error:
        say(str(error))
        return 1
    say("\n".join(["", table(rows), "", f"also in {out / 'compare.md'}; picture: {out / 'compare.png'}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
