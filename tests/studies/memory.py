"""What the stream holds in memory over two epochs: proportional set size of the trainer and its decode workers, per 1 % of an epoch.

    python -m tests.studies.memory samples=20000 side=160 workers=2 batch=64 picture=memory.png

The shards are made of noise on the spot, in a folder that is deleted. It prints the least and the most of the second epoch and how far a straight line
through it rises, and ends with 1 where that is more than 5 %.
"""

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from softmoe_train.config import compose
from softmoe_train.data import build_stream
from softmoe_train.settings import RunConfig
from tests.studies.options import options_of

MIB = 2**20


class Point(NamedTuple):
    """Memory at a place in the sequence: MiB of this process, and of its decode workers together."""

    epochs: float
    trainer: float
    workers: float


def held(pid: int) -> float:
    """MiB of a process, of what it shares its part (PSS); 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def children() -> list[int]:
    """The processes that this one has started."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def make_shards(folder: Path, samples: int, side: int, shards: int) -> None:
    """Tars of JPEGs, each of noise that is smooth enough to be like a picture's."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(50):
        small = Image.fromarray(random.integers(0, 256, (side // 8, side // 6, 3), np.uint8))
        file = io.BytesIO()
        small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for shard, numbers in enumerate(np.array_split(np.arange(samples), shards)):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for number in numbers.tolist():
                for suffix, data in (("jpg", pictures[number % len(pictures)]), ("cls", b"%d" % (number % 10))):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def curve(folder: Path, samples: int, workers: int, batch: int, epochs: int) -> Iterator[Point]:
    """A point per 1 % of an epoch."""
    words = [f"data.train={folder}", f"data.workers={workers}", f"data.streams={min(batch, 16)}", f"batch_size={batch}"]
    config = compose(RunConfig, ["data=inception", *words], lambda _: [])
    stream = build_stream(config.data, image_size=64, num_classes=10, seed=0, global_batch=batch, rank=0, world=1)
    batches = epochs * samples // batch
    every = max(1, samples // batch // 100)
    for number, _ in enumerate(islice(stream, batches), 1):
        if number % every == 0:
            yield Point(number * batch / samples, held(os.getpid()), sum(held(pid) for pid in children()))


def rise(points: list[Point]) -> float:
    """How far a straight line through the points rises from first to last, relative to their mean: all processes together."""
    total = np.asarray([point.trainer + point.workers for point in points])
    slope = np.polyfit(np.linspace(0, 1, len(total)), total, 1)[0]
    return float(slope / total.mean())


def draw(points: list[Point], path: str) -> None:
    """The curve as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = [point.epochs for point in points]
    axes.plot(epochs, [point.trainer for point in points], label="training process")
    axes.plot(epochs, [point.workers for point in points], label="decode workers, together")
    axes.set(xlabel="epochs", ylabel="MiB (proportional set size)", ylim=(0, None), title="Memory of a stream")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(words: list[str]) -> int:
    """Run two epochs and tell."""
    known = {"samples": "20000", "side": "160", "workers": "2", "batch": "64", "picture": ""}
    asked = options_of(words, known)
    samples, side, workers, batch = (int(asked[name]) for name in ("samples", "side", "workers", "batch"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        make_shards(Path(folder), samples, side, shards=20)
        points = list(curve(Path(folder), samples, workers, batch, epochs=2))
    if asked["picture"]:
        draw(points, asked["picture"])
    second = [point for point in points if point.epochs > 1]
    for name in ("trainer", "workers"):
        values = [getattr(point, name) for point in second]
        print(f"{name}: {min(values):,.0f} to {max(values):,.0f} MiB over the second epoch")
    rises = rise(second)
    print(f"a straight line through it rises by {100 * rises:.1f} %")
    return int(rises > 0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
