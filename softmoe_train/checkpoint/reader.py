"""This file owns loading: what a rank needs, whether it is all there, and then the copy into the rank's own tensors.

Three stages, each finished on every rank before the next begins: coverage (nothing is opened but JSON), hashes (each
chunk that a rank needs, and the header of its file, is read once through a buffer), copy (the needed rows are read
again, now from the page cache, straight into the target). Two passes cost a second read but keep host memory at one
buffer, and no target is touched before all that every rank needs is known to be good.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint.agreement import CheckpointError, DamagedError
from softmoe_train.checkpoint.layout import Box, local_box, overlap, within
from softmoe_train.checkpoint.manifest import DTYPES, Manifest, StoredChunk, StoredTensor, described, held_in
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.shards import chunk_fault, header_fault, read_part


class Read(NamedTuple):
    """A part of a stored chunk, and the target (this rank's box of the tensor) that it belongs into."""

    name: str
    tensor: StoredTensor
    chunk: StoredChunk
    part: Box
    held: Box


class Loaded(NamedTuple):
    """What a load read, of the whole checkpoint."""

    tensors: dict[str, int]  # how many, by the first part of their names
    bytes: int
    files: int
    saved_by: int  # ranks

    def __str__(self) -> str:
        counts = [f"{count:,} {kind}" for kind, count in self.tensors.items()]
        listed = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
        files = f"{self.files:,} file{'' if self.files == 1 else 's'}"
        return f"{listed} tensors ({self.bytes / 2**20:,.1f} MiB in {files})"


def plan_reads(
    path: Place, manifest: Manifest, tensors: Mapping[str, Tensor | DTensor], prefix: str | tuple[str, ...]
) -> list[Read]:
    """What this rank must read to fill `tensors`, file by file.

    Raises CheckpointError with every problem at once, DamagedError where only files are at fault.
    """
    stored = {name: tensor for name, tensor in manifest.tensors.items() if name.startswith(prefix)}
    problems = [f"{name} is asked for but not in the checkpoint" for name in tensors if name not in stored]
    problems += [f"{name} is in the checkpoint but nothing here takes it" for name in stored if name not in tensors]
    reads: list[Read] = []
    for name in sorted(set(tensors) & set(stored)):
        try:
            reads += _reads_of(name, stored[name], tensors[name])
        except CheckpointError as error:
            problems += error.problems
    reads.sort(key=lambda read: (read.chunk.file, read.chunk.start))
    faults = file_faults(path, manifest, {read.chunk.file for read in reads}).values()
    if problems:
        raise CheckpointError(f"{path} cannot be loaded", [*problems, *faults])
    if faults:
        raise DamagedError(f"{path} is damaged", list(faults))
    return reads


def loaded(manifest: Manifest, prefix: str | tuple[str, ...], saved_by: int) -> Loaded:
    """What a load of all tensors that begin with `prefix` amounts to."""
    taken = {name: tensor for name, tensor in manifest.tensors.items() if name.startswith(prefix)}
    size = sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in taken.values())
    files = {chunk.file for tensor in taken.values() for chunk in tensor.chunks}
    return Loaded(dict(Counter(name.partition(".")[0] for name in taken)), size, len(files), saved_by)


def check_hashes(path: Place, manifest: Manifest, reads: list[Read]) -> None:
    """Read every chunk that `reads` need, and the headers of their files; raises DamagedError naming each that is not what was saved."""
    problems = []
    held = held_in(manifest, {read.chunk.file for read in reads})
    for file, of_file in _by_file(reads):
        chunks = {read.chunk.start: read for read in of_file}
        with (path / file).open("rb") as handle:
            faults = [header_fault(handle, file, held[file])]
            faults += [chunk_fault(handle, read.name, read.tensor, read.chunk) for read in chunks.values()]
        problems += [fault for fault in faults if fault]
    if problems:
        raise DamagedError(f"{path} is damaged", problems)


def copy_reads(path: Place, reads: list[Read], tensors: Mapping[str, Tensor | DTensor]) -> None:
    """Fill `tensors` in place from checked files."""
    with torch.no_grad():
        for file, of_file in _by_file(reads):
            with (path / file).open("rb") as handle:
                for read in of_file:
                    tensor = tensors[read.name]
                    # This rank's own part, placed as it is: nothing is reduced, so no gradient placement matters.
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    target = local.detach()[within(read.part, read.held)]
                    read_part(handle, read.tensor, read.chunk, read.part, target)


def file_faults(path: Place, manifest: Manifest, files: Iterable[str]) -> dict[str, str]:
    """The files that cannot hold what the manifest says of them, each with why and what is lost; opens nothing."""
    faults = {file: fault for file in sorted(files) if (fault := _size_fault(path / file, manifest.files[file]))}
    return {
        file: f"{file} {faults[file]}; it holds {'; '.join(described(name, chunk) for name, _, chunk in held)}"
        for file, held in held_in(manifest, faults).items()
    }


def _size_fault(path: Place, size: int) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing"
    held = path.stat().st_size
    return None if held == size else f"has {held} bytes, not {size}"


def _reads_of(name: str, stored: StoredTensor, tensor: Tensor | DTensor) -> list[Read]:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if (shape, dtype) != (stored.shape, stored.dtype):
        fault = f"{name} is {stored.dtype} {stored.shape} in the checkpoint but {dtype} {shape} here"
        raise CheckpointError("different tensors", [fault])
    if tensor.is_meta:  # a copy into it would succeed and leave nothing
        raise CheckpointError("no room", [f"{name} is on the meta device here: materialise it before loading"])
    held = local_box(name, tensor)
    parts = [(chunk, overlap(held, chunk.box)) for chunk in stored.chunks]
    return [Read(name, stored, chunk, part, held) for chunk, part in parts if part is not None]


def _by_file(reads: list[Read]) -> Iterator[tuple[str, list[Read]]]:
    for file, of_file in groupby(reads, key=lambda read: read.chunk.file):
        yield file, list(of_file)
