"""This file owns the times of finding a place: the index of a tar against reading it, and a seek to the middle of an epoch.

    python -m tests.studies.seek folder=/tmp/seek samples=1000000 shards=100 gib=1

Makes a data set of tiny pictures and one tar of 100 KB members, and prints what it measures. Kept until the folder is deleted.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from softmoe_train.data import Cursor, build_stream
from softmoe_train.data.index import index_shards
from tests.hostile_tars import BLOCK, header, padded
from tests.studies.options import options_of
from tests.unit.data.conftest import encoded, numbered_picture, settings

BATCH, STREAMS, WINDOW = 256, 256, 4096


def tiny(folder: Path, samples: int, shards: int) -> list[Path]:
    """Shards of a 4 x 4 picture and a label a sample: 2 KB each."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, each = padded(encoded(numbered_picture(0))), samples // shards
    size, paths = len(encoded(numbered_picture(0))), []
    for shard in range(shards):
        paths.append(folder / f"{shard:04d}.tar")
        if paths[-1].is_file():
            continue
        with (folder / "part").open("wb") as file:
            for number in range(shard * each, (shard + 1) * each):
                key = b"%08d" % number
                file.write(header(key + b".cls", 1) + padded(b"%d" % (number % 10)))
                file.write(header(key + b".png", size) + picture)
            file.write(bytes(2 * BLOCK))
        (folder / "part").rename(paths[-1])
    return paths


def large(folder: Path, gib: float) -> Path:
    """One tar of 100 KB members."""
    path = folder / "large.tar"
    if not path.is_file():
        with (folder / "part").open("wb") as file:
            for number in range(round(gib * (1 << 30) / 102_400)):
                file.write(header(b"%08d.jpg" % number, 100_000) + padded(os.urandom(100_000)))
                file.write(header(b"%08d.cls" % number, 1) + padded(b"1"))
            file.write(bytes(2 * BLOCK))
        (folder / "part").rename(path)
    return path


def read_and_hashed(path: Path) -> float:
    """Seconds of reading a file from its beginning to its end and taking its SHA-256: the floor of an index."""
    began, digest = time.perf_counter(), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return time.perf_counter() - began


def indexed(path: Path, cache: Path) -> float:
    """Seconds of making the index of a tar that has none."""
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    began = time.perf_counter()
    list(index_shards([str(path)]))
    return time.perf_counter() - began


def first_batch(folder: str, position: int, workers: int) -> dict[str, float]:
    """Seconds from a configuration to the first batch at `position`, in this process, and the bytes that reading it took."""
    began, before = time.perf_counter(), _bytes_read()
    cfg = settings(train=folder, streams=STREAMS, shuffle_window=WINDOW, block=512, workers=workers)
    stream = build_stream(cfg, image_size=4, num_classes=10, seed=0, global_batch=BATCH, rank=0, world=1)
    built = time.perf_counter() - began
    stream.seek(Cursor(position))
    batch = next(iter(stream))
    assert batch.sample_ids[0] == position
    return {"built": built, "first_batch": time.perf_counter() - began, "bytes": _bytes_read() - before}


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main(words: list[str]) -> None:
    """Measure, and print."""
    defaults = {"folder": "seek", "samples": "1000000", "shards": "100", "gib": "1", "rounds": "5", "child": ""}
    options = options_of(words, defaults)
    folder, samples = Path(options["folder"]), int(options["samples"])
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    if options["child"]:
        position, workers = map(int, options["child"].split(","))
        print(json.dumps(first_batch(str(folder / "tiny"), position, workers)))
        return
    paths = tiny(folder / "tiny", samples, int(options["shards"]))
    began = time.perf_counter()
    list(index_shards(map(str, paths)))
    print(f"index of {samples:,} samples in {len(paths)} tars: {time.perf_counter() - began:.1f} s", flush=True)
    middle = samples // 2 // BATCH * BATCH
    for workers in (0, 2):
        for where, position in (("beginning", 0), ("middle", middle)):
            found = []
            for _ in range(int(options["rounds"])):
                line = [sys.executable, "-m", "tests.studies.seek", f"folder={folder}", f"child={position},{workers}"]
                found.append(json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout))
            best, worst = (how(one["first_batch"] for one in found) for how in (min, max))
            print(
                f"first batch at the {where} with {workers} workers: {best:.2f} to {worst:.2f} s after the imports "
                f"(stream built: {min(one['built'] for one in found):.2f} s), {found[0]['bytes']:,} bytes read",
                flush=True,
            )
    path = large(folder, float(options["gib"]))
    floors, times = [], []
    for _ in range(int(options["rounds"])):
        floors.append(read_and_hashed(path))
        times.append(indexed(path, folder / "large_cache"))
    print(
        f"index of {path.stat().st_size / 1e9:.2f} GB in 100 KB members: {min(times):.2f} s; reading and SHA-256 alone: "
        f"{min(floors):.2f} s; ratio {min(times) / min(floors):.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
