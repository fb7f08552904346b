"""Pictures on the disk to make shards of, and shards read back by tarfile alone."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_train.commands.main import main
from tests.unit.data.conftest import encoded, index_cache, numbered_picture, shared  # noqa: F401

Sample = dict[str, bytes]


def picture(number: int, kind: str = "PNG", size: int = 12) -> bytes:
    """A small picture that differs from all others."""
    return encoded(numbered_picture(number, size), kind)


def write(path: Path, data: bytes) -> Path:
    """A file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three classes of 14, 13 and 13 pictures, PNG and JPEG, some in folders below."""
    root = tmp_path / "pictures"
    for number in range(40):
        kind, suffix = (("PNG", "png"), ("JPEG", "JPEG"))[number % 2]
        deeper = "more/" if number % 5 == 0 else ""
        write(root / "abc"[number % 3] / f"{deeper}p{number:03d}.{suffix}", picture(number, kind))
    return root


def make(*overrides: str) -> int:
    """`softmoe shards make` in this process."""
    return main(["shards", "make", "progress=plain", "processes=1", *overrides])


def samples(*shards: Path) -> dict[str, Sample]:
    """Every sample of tars by its key, as a few lines of tarfile read them."""
    found: dict[str, Sample] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                sample = found.setdefault(f"{folder}{slash}{stem}", {})
                assert suffix not in sample
                sample[suffix] = file.read()
    return found


def counts(out: Path, name: str = "train") -> list[int]:
    """Samples of each shard."""
    return [len(samples(path)) for path in sorted(out.glob(f"{name}-*.tar"))]


def tree(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def opened(data: bytes) -> Image.Image:
    """A picture by Pillow alone."""
    return Image.open(io.BytesIO(data))


def left_out(out: Path) -> dict[str, str]:
    """What left_out.jsonl says: reasons by name."""

    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    return {line["name"]: line["reason"] for line in lines}


def forked(work: Callable[[], object]) -> int:
    """The exit code of a forked child that does `work`, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mean_colour(data: bytes) -> np.ndarray:
    """Of a picture."""
    return np.asarray(opened(data).convert("RGB"), np.float64).mean((0, 1))
