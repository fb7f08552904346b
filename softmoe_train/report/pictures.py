"""This file owns the pictures of runs: the newest of each name, made small."""

import io
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from softmoe_train.plain import plain
from softmoe_train.report.read import RunRead

SIDE = 900  # pixels, at most
LARGEST = 32 * 2**20  # bytes of a file
MOST_PIXELS = 40_000_000
OF_A_RUN = 12
IN_ALL = 72


class Thumbnail(NamedTuple):
    """A picture of a run."""

    name: str
    step: str
    png: bytes
    size: tuple[int, int]


def newest_pictures(folder: Path) -> dict[str, Path]:
    """The newest picture of each name below the `pictures` of a run folder."""
    newest: dict[str, Path] = {}
    root = folder / "pictures"
    for path in [] if root.is_symlink() else sorted(root.rglob("step_*.png")):
        if path.is_file() and not path.is_symlink():
            newest[path.parent.relative_to(root).as_posix()] = path
    return newest


def thumbnails(run: RunRead, room: int) -> tuple[list[Thumbnail], list[str]]:
    """The pictures of a run, at most `room` of them, and what was left out."""
    made, left_out = [], []
    try:
        newest = newest_pictures(run.folder)
    except OSError as error:
        return [], [f"{plain(run.name)}: its pictures cannot be read ({error.strerror})"]
    most = min(room, OF_A_RUN)
    for name, path in list(newest.items())[:most]:
        try:
            made.append(_small(name, path))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            left_out.append(f"{plain(run.name)}: {plain(name)} is no picture that can be shown ({plain(error, 80)})")
    if len(newest) > most:
        left_out.append(
            f"{plain(run.name)}: {len(newest) - most} more pictures are in {plain(run.folder / 'pictures')}"
        )
    return made, left_out


def _small(name: str, path: Path) -> Thumbnail:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    with PIL.Image.open(path, formats=["PNG"]) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels")
        small = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
    small.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return Thumbnail(name, path.stem.removeprefix("step_").lstrip("0") or "0", file.getvalue(), small.size)
