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
    """Whether the run `name` of lives in `folder` ended as the one named `whole`, and went the same way."""
    whole, other = folder / "whole", folder / name
    last = f"checkpoints/step_{steps:08d}/loop.json"
    loops = [json.loads((run / last).read_text()) for run in (whole, other)]
    keys = [consumed(folder, name, steps) for name in ("whole", name)]
    return {
        "weights and moments": same_bits(stored(whole, steps), stored(other, steps)),
        **{name: metrics(whole, name) == metrics(other, name) != {} for name in MEASURES},
        "every step reported once": [*metrics(other, "train/loss")] == [*range(1, steps + 1)]
        and len((whole / "metrics.jsonl").read_text().splitlines())
        == len((other / "metrics.jsonl").read_text().splitlines()),
        "loop state": all(loops[0][key] == loops[1][key] for key in loops[0] if key != "wandb_id"),
        "consumed keys": keys[0] == keys[1],
    }


def consumed(folder: Path, name: str, steps: int) -> list[list[str]]:
    """The keys of each step's samples, all ranks together, on the way to the end: what a kill undid is cut back."""
    names, ranks = keys_by_name(folder), []
    for file in sorted((folder / f"{name}_consumed").glob("rank_*.jsonl")):
        way: list[list[str]] = []
        for line in map(json.loads, file.read_text().splitlines()):
            step = line["position"] // BATCH
            assert step <= len(way) + 1, f"{file} jumps from step {len(way)} to {step}"
            keys = [names[picture] for picture in line["pictures"]]
            assert step > len(way) or way[step - 1] == keys, f"{file}: step {step} was not repeated as it was"
            way[step - 1 :] = [keys]
        assert len(way) == steps, (file, len(way))
        ranks.append(way)
    assert len(ranks) == 2
    return [[key for keys in of_step for key in keys] for of_step in zip(*ranks, strict=True)]


def keys_by_name(folder: Path) -> dict[str, str]:
    """The key of each training picture by what stands for it in the record, read from the tars without our package."""
    names: dict[str, str] = {}
    for path in sorted((folder / "shards/digits").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    png = tar.extractfile(member)
                    assert png is not None
                    pixels = np.asarray(Image.open(io.BytesIO(png.read())).convert("RGB")).transpose(2, 0, 1)
                    names[name_of(np.ascontiguousarray(pixels).tobytes())] = member.name.removesuffix(".png")
    return names
