"""This file owns whether two runs were the same: weights, moments, metrics, loop state, and the keys consumed on the way."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.consumed import name_of
from tests.life import BATCH
from tests.runs import metrics, same_bits, stored

MEASURES = ("train/loss", "train/grad_norm", "train/learning_rate", "upstream/test/loss")


def compared(folder: Path, name: str, steps: int) -> dict[str, bool]:
    """Whether the run `name` of lives in `folder` ended as the one named `whole`, and went the same way, bit for bit on one layout."""
    whole, other = folder / "whole", folder / name
    last = f"checkpoints/step_{steps:08d}/loop.json"
    loops = [json.loads((run / last).read_text()) for run in (whole, other)]
    return {
        "weights and moments": same_bits(stored(whole, steps), stored(other, steps)),
        **{name: metrics(whole, name) == metrics(other, name) != {} for name in MEASURES},
        "loop state": all(loops[0][key] == loops[1][key] for key in loops[0] if key != "wandb_id"),
        **same_way(folder, name, steps),
    }


def same_way(folder: Path, name: str, steps: int) -> dict[str, bool]:
    """Whether the run `name` went the way of the one named `whole`, on whatever ranks: its samples and its reports."""
    whole, other = folder / "whole", folder / name
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, other)]
    return {
        "every step reported once": [*metrics(other, "train/loss")] == [*range(1, steps + 1)]
        and len(lines[0]) == len(lines[1]),
        "consumed keys": consumed(folder, "whole", steps) == consumed(folder, name, steps),
    }


def farthest_loss(folder: Path, name: str) -> float:
    """How far the losses of the run `name` are at most from those of the one named `whole`: sums round otherwise on other ranks."""
    whole, other = (metrics(folder / run, "train/loss") for run in ("whole", name))
    return max(abs(whole[step] - other[step]) for step in whole)


def consumed(folder: Path, name: str, steps: int) -> list[list[str]]:
    """The shard and key of each step's samples, in their order over all ranks, on the way to the end: what a kill undid is cut back."""
    names, way, seen = keys_by_name(folder), [], {}
    for life in sorted((folder / f"{name}_consumed").iterdir()):
        started = False
        for file in sorted(life.iterdir()):
            own = [json.loads(line) for line in file.read_text().splitlines()]
            numbers = [line["position"] // BATCH for line in own]
            assert numbers == list(range(numbers[0], numbers[0] + len(own))), f"{file} jumps: {numbers}"
            if not started:
                assert numbers[0] <= len(way) + 1, f"{file} jumps from step {len(way)} to {numbers[0]}"
                del way[numbers[0] - 1 :]
                started = True
            way += [{} for _ in range(numbers[-1] - len(way))]
            for step, line in zip(numbers, own, strict=True):
                got = dict(zip(line["samples"], map(names.__getitem__, line["pictures"]), strict=True))
                assert got == {number: seen.get(number, key) for number, key in got.items()}, f"{file}: {step} changed"
                assert not got.keys() & way[step - 1].keys(), f"{file}: step {step} has samples of another rank"
                seen |= got
                way[step - 1] |= got
    assert len(way) == steps, (name, len(way))
    for step, got in enumerate(way):
        assert sorted(got) == [*range(step * BATCH, (step + 1) * BATCH)], f"step {step + 1} lacks samples"
    return [[got[number] for number in sorted(got)] for got in way]


def keys_by_name(folder: Path) -> dict[str, str]:
    """The shard and key of each training picture by what stands for it in the record, read from the tars without our package."""
    names: dict[str, str] = {}
    for path in sorted((folder / "shards/digits").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    png = tar.extractfile(member)
                    assert png is not None
                    pixels = np.asarray(Image.open(io.BytesIO(png.read())).convert("RGB")).transpose(2, 0, 1)
                    picture = name_of(np.ascontiguousarray(pixels).tobytes())
                    names[picture] = f"{path.name} {member.name.removesuffix('.png')}"
    return names
