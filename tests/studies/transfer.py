"""What transfers: a small Soft MoE is pretrained on classes 0 to 4 of CIFAR-10 shards, then measured on classes 5 to 9 and on Omniglot.

A program: `python -m tests.studies.transfer data=FOLDER out=FOLDER [seeds=0,1,2] [steps=2000] [tune_steps=250] [peaks=0.0003,0.001,0.003] [jobs=1]
[parts=tune,fewshot]`. The folder `data` holds cifar10-{train,test}-*.tar and omniglot40-{train,test}-*.tar. Every training and measurement is a
`softmoe` of its own with one thread, in a folder of its own under `out`; what is complete is not repeated, what was interrupted goes on.

- `tune`: fine-tuning on about 1,000 images of classes 5 to 9 at 64 pixels, twice the pretraining's, beside the same run from scratch; each takes the rate that is best
  on about 500 held-out images at the first seed, and is tested once, on the 1,000 test images of these classes.
- `fewshot`: 1, 5, 10 and 25 images a class of classes 5 to 9 on the features of the pretrained and of the untrained model, and 10 of each of Omniglot's 40.

Into `out` go table.json, table.md and transfer.png: paired differences over the seeds, with their standard errors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.studies.options import options_of, say

OLD, NEW = "[0,1,2,3,4]", "[5,6,7,8,9]"
SHOTS = (1, 5, 10, 25)
RIDGE_ON_PIXELS = 0.40  # of Omniglot's 40 classes at 10 shots
QUIET = ["observe.wandb.mode=disabled", "observe.progress=off", "device=cpu", "processes=1"]
MODEL = [  # that of recipe=compare, of 5 classes: 16 tokens at 32 pixels, 64 at 64; 16 slots at both
    "model.patch_size=8", "model.width=64", "model.depth=4", "model.mlp_dim=256", "model.num_heads=4", "model.position_std=0.5", "model.moe.blocks=last 2",
    "model.moe.num_experts=16", "model.moe.slots_per_expert=1", "model.moe.expert_init=independent",
]  # fmt: skip
TUNE = [
    "recipe=finetune/cifar10", "data=cifar10", "data.streams=10", f"data.keep.labels={NEW}", "data.keep.renumber=true",
    "data.keep.keys=cifar10-(test|train-00[012])",  # 3,000 images of the training shards, half of them of these classes
    "data.holdout=0.333", "model.image_size=64", "model.num_classes=5", "batch_size=50", "precision=float32", "parallel.sharding=replicated",
    "optim=adamw", "optim.decay.head=0.05", "optim.decay.kernels=0.05", "checkpoint.every=0", "observe.every=50", "evals.finetune.batch_size=100",
]  # fmt: skip
# One step at rate 0: the weights stay as they are, and are measured.
MEASURE = [
    "recipe=finetune/cifar10", "data=synthetic", "data.streams=8", "batch_size=8", "precision=float32", "parallel.sharding=replicated", "model.image_size=32",
    "model.num_classes=5", "steps=1", "schedule.warmup_steps=1", "checkpoint.every=0", "evals=[fewshot]", "evals.fewshot.every=0", "evals.fewshot.seeds=3",
    "evals.fewshot.data.workers=0",
]  # fmt: skip
ARMS = ("pretrained", "from scratch")


@dataclass(frozen=True)
class Study:
    """What is asked for."""

    data: str
    out: Path
    seeds: list[int]
    steps: int
    tune_steps: int
    peaks: list[str]
    jobs: int
    parts: list[str]


@dataclass(frozen=True)
class Part:
    """One `softmoe`: its folder is where its result is."""

    folder: Path
    words: list[str]

    @property
    def complete(self) -> bool:
        """Whether it came to its end."""
        try:
            return json.loads((self.folder / "summary.json").read_text())["ended"] == "complete"
        except (OSError, ValueError):
            return False

    def metric(self, name: str) -> float:
        """The last value of a metric."""
        return json.loads((self.folder / "summary.json").read_text())["metrics"][name]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """A metric by step."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line[name]) for line in lines if name in line]


def shards(asked: Study, name: str) -> dict[str, str]:
    """The patterns of a set's training and test shards."""
    return {part: f"{asked.data}/{name}-{part}-*.tar" for part in ("train", "test")}


def of_data(asked: Study) -> list[str]:
    """Those of CIFAR-10, as overrides."""
    return [f"data.{part}={pattern}" for part, pattern in shards(asked, "cifar10").items()]


def pretraining(asked: Study, seed: int, *, steps: int) -> Part:
    """Training on the first five classes; one step of rate 0 leaves the model as it begins."""
    name = "pretrained" if steps > 1 else "untrained"
    own = [
        "model.num_classes=5", f"steps={steps}", "batch_size=50", "data.streams=10", f"data.keep.labels={OLD}", "data.keep.renumber=true",
        f"schedule.warmup_steps={max(1, steps // 20)}", f"evals.upstream.every={max(1, steps // 10)}", "evals.upstream.batch_size=100",
    ]  # fmt: skip
    return Part(asked.out / name / f"seed{seed}", ["train", "recipe=compare", *of_data(asked), *own, f"seed={seed}"])


def tuning(asked: Study, arm: str, seed: int, peak: str) -> Part:
    """Training on the other five classes at twice the resolution, from the pretrained weights or from scratch."""
    own = [
        *TUNE, *of_data(asked), f"steps={asked.tune_steps}", f"schedule.warmup_steps={max(1, asked.tune_steps // 10)}", f"schedule.peak={peak}",
        f"evals.finetune.every={max(1, asked.tune_steps // 5)}", f"seed={seed}",
    ]  # fmt: skip
    begin = ["finetune", f"ckpt={pretraining(asked, seed, steps=asked.steps).folder}"]
    words = [*begin, *own] if arm == "pretrained" else ["train", *own, *MODEL]
    return Part(asked.out / "tune" / arm.replace(" ", "_") / f"peak{peak}" / f"seed{seed}", words)


def fewshot(asked: Study, of: Part, name: str, shots: Sequence[int], keep: str) -> Part:
    """A ridge classifier on the features of the model that `of` left, in three draws."""
    parts = ", ".join(f"{part}: '{pattern}'" for part, pattern in shards(asked, name).items())
    how = f"{{{parts}, keep: {keep}, test_transform: {{kind: resize, resize: null, antialias: true}}}}"
    words = [f"evals.fewshot.sets.{name}={how}", f"evals.fewshot.shots={list(shots)}", f"ckpt={of.folder}"]
    return Part(asked.out / "fewshot" / name / of.folder.parent.name / of.folder.name, ["finetune", *MEASURE, *words])


def fewshots(asked: Study, seed: int, *, trained: bool) -> tuple[Part, Part]:
    """That of the new classes and that of Omniglot, of one model."""
    of = pretraining(asked, seed, steps=asked.steps if trained else 1)
    all_kept = "{labels: null, keys: null, renumber: false}"
    new = all_kept.replace("labels: null", f"labels: {NEW}")
    return fewshot(asked, of, "cifar10", SHOTS, new), fewshot(asked, of, "omniglot40", [10], all_kept)


def complete(asked: Study, what: str, parts: list[Part]) -> None:
    """Do what is not complete, `jobs` at a time; raises RuntimeError with what one that failed said."""
    left = [part for part in parts if not part.complete]
    say(f"{what}: {len(parts)} parts, {len(parts) - len(left)} complete already")
    with ThreadPoolExecutor(asked.jobs) as pool:
        for number, part in enumerate(pool.map(_done, left), start=1):
            say(f"  {number} of {len(left)}: {part.folder.relative_to(asked.out)}")


def _done(part: Part) -> Part:
    done = subprocess.run(
        [sys.executable, "-m", "softmoe_train", *part.words, *QUIET, f"run_dir={part.folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{part.folder} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return part


def chosen(asked: Study, arm: str) -> str:
    """The rate that is best on the held-out images at the first seed."""
    held = {peak: tuning(asked, arm, asked.seeds[0], peak).metric("finetune/val/top1") for peak in asked.peaks}
    return max(held, key=lambda peak: held[peak])


def study(asked: Study) -> list[dict[str, Any]]:
    """Do what is missing; the rows of the table, which is written with the picture."""
    complete(asked, "pretraining", [pretraining(asked, seed, steps=asked.steps) for seed in asked.seeds])
    rows, first = [], asked.seeds[0]
    if "tune" in asked.parts:
        grid = [tuning(asked, arm, first, peak) for arm in ARMS for peak in asked.peaks]
        complete(asked, "rates at the first seed", grid)
        best = {arm: chosen(asked, arm) for arm in ARMS}
        complete(
            asked,
            f"fine-tuning with {best}",
            [tuning(asked, arm, seed, best[arm]) for arm in ARMS for seed in asked.seeds],
        )
        tuned = {
            arm: [tuning(asked, arm, seed, best[arm]).metric("finetune/test/top1") for seed in asked.seeds]
            for arm in ARMS
        }
        rows.append(row("fine-tuned on classes 5 to 9 at 64 px", tuned, {f"peak, {arm}": best[arm] for arm in ARMS}))
    if "fewshot" in asked.parts:
        complete(asked, "untrained models", [pretraining(asked, seed, steps=1) for seed in asked.seeds])
        measured = {
            name: [fewshots(asked, seed, trained=name == "pretrained") for seed in asked.seeds]
            for name in ("pretrained", "untrained")
        }
        complete(asked, "few-shot", [part for pairs in measured.values() for pair in pairs for part in pair])
        for k in SHOTS:
            values = {
                name: [new.metric(f"fewshot/cifar10/{k}shot") for new, _ in pairs] for name, pairs in measured.items()
            }
            rows.append(row(f"{k}-shot on classes 5 to 9", values, {}))
        values = {
            name: [other.metric("fewshot/omniglot40/10shot") for _, other in pairs] for name, pairs in measured.items()
        }
        rows.append(row("10-shot on omniglot40", values, {"ridge on pixels": RIDGE_ON_PIXELS}))
    (asked.out / "table.json").write_text(json.dumps({"seeds": asked.seeds, "rows": rows}, indent=1))
    (asked.out / "table.md").write_text(table(rows) + "\n")
    draw(asked, rows, asked.out / "transfer.png")
    return rows


def row(what: str, values: dict[str, list[float]], facts: dict[str, Any]) -> dict[str, Any]:
    """Two arms beside each other, seed by seed."""
    (one, these), (other, those) = values.items()
    apart = [a - b for a, b in zip(these, those, strict=True)]
    error = stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None
    return {"what": what, one: these, other: those, "difference": fmean(apart), "standard_error": error, **facts}


def table(rows: list[dict[str, Any]]) -> str:
    """The study as Markdown, in percent."""
    lines = [
        "| top-1 % on test images | with pretraining | without | difference | standard error |",
        "|---|---|---|---|---|",
    ]
    for of in rows:
        with_it, without = of["pretrained"], of.get("from scratch", of.get("untrained"))
        kind = "from scratch" if "from scratch" in of else "untrained"
        facts = "".join(f"; {key} {of[key]}" for key in of if key.startswith(("peak", "ridge")))
        error = "-" if of["standard_error"] is None else f"{100 * of['standard_error']:.1f}"
        cells = [
            of["what"] + facts,
            _each(with_it),
            f"{_each(without)} ({kind})",
            f"{100 * of['difference']:+.1f}",
            error,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Mean and, in brackets, each seed; differences are paired by seed."])


def _each(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def draw(asked: Study, rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: fine-tuning's held-out curves, few-shot by shots, and Omniglot beside ridge on pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, few, omniglot = figure.subplots(1, 3)
    for of in rows:
        if "from scratch" in of:
            for arm, colour in zip(ARMS, ("#0072b2", "#d55e00"), strict=True):
                for seed in asked.seeds:
                    curve = tuning(asked, arm, seed, of[f"peak, {arm}"]).curve("finetune/val/top1")
                    label = f"{arm}: {100 * fmean(of[arm]):.1f} % on test" if seed == asked.seeds[0] else None
                    curves.plot(*zip(*curve, strict=True), color=colour, label=label, marker=".")
        elif "omniglot" in of["what"]:
            for place, name in enumerate(("pretrained", "untrained")):
                omniglot.plot([place] * len(of[name]), of[name], "o")
            omniglot.axhline(RIDGE_ON_PIXELS, color="grey", linestyle=":", label="ridge on pixels")
    shots = {int(of["what"].partition("-")[0]): of for of in rows if of["what"].endswith("-shot on classes 5 to 9")}
    for name, colour in (("pretrained", "#0072b2"), ("untrained", "#d55e00")) if shots else ():
        few.plot(list(shots), [fmean(of[name]) for of in shots.values()], color=colour, marker=".", label=name)
        few.fill_between(
            list(shots), *([end(of[name]) for of in shots.values()] for end in (min, max)), color=colour, alpha=0.15
        )
    curves.set(title="fine-tuned at 64 px: held-out top-1, every seed", xlabel="step")
    few.set(
        title="few-shot on classes 5 to 9: mean, lowest, highest",
        xlabel="images a class",
        xscale="log",
        xticks=SHOTS,
        xticklabels=SHOTS,
    )
    omniglot.set(
        title="omniglot40, 10-shot: every seed", xticks=[0, 1], xticklabels=["pretrained", "untrained"], xlim=(-1, 2)
    )
    for axes in (curves, few, omniglot):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(words: list[str]) -> int:
    """The study as a program."""
    known = {
        "data": "", "out": "", "seeds": "0,1,2", "steps": "2000", "tune_steps": "250", "peaks": "0.0003,0.001,0.003", "jobs": "1", "parts": "tune,fewshot",
    }  # fmt: skip
    options = options_of(words, known)
    if not options["data"] or not options["out"]:
        say("data=FOLDER (with cifar10-*.tar and omniglot40-*.tar) and out=FOLDER are needed")
        return 2
    asked = Study(
        options["data"], Path(options["out"]), [int(seed) for seed in options["seeds"].split(",")], int(options["steps"]),
        int(options["tune_steps"]), options["peaks"].split(","), int(options["jobs"]), options["parts"].split(","),
    )  # fmt: skip
    try:
        rows = study(asked)
    except RuntimeError as error:
        say(str(error))
        return 1
    say("\n".join(["", table(rows), "", f"also in {asked.out / 'table.md'}; picture: {asked.out / 'transfer.png'}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
