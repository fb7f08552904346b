"""This file owns reading stored tensors whole in one process: block by block of rows, however they were cut when they were saved."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase

import torch
from torch import Tensor

from softmoe_train.checkpoint.layout import Box, overlap, within
from softmoe_train.checkpoint.manifest import Manifest, StoredTensor
from softmoe_train.checkpoint.reader import Read
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.shards import BUFFER, read_part

MOST_OPEN = 200  # files at a time


class Files:
    """The rank files of one checkpoint, opened where they are needed and a bounded number at a time."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self._open: dict[str, BufferedIOBase] = {}

    def open(self, name: str) -> BufferedIOBase:
        """The file of that name; it stays open for the next part."""
        if name not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = (self.path / name).open("rb")
        return self._open[name]

    def close(self) -> None:
        """Close them all."""
        for file in self._open.values():
            file.close()


@contextmanager
def opened(path: Place) -> Iterator[Files]:
    """The files of the checkpoint `path`, closed at the end of the block."""
    files = Files(path)
    try:
        yield files
    finally:
        files.close()


def blocks(
    files: Files, tensor: StoredTensor, dtype: torch.dtype, rows: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """The values of a stored tensor in order, or of rows [first, stop) of dim 0, converted to `dtype`.

    A block holds as many rows as fit a buffer, or one. Raises CheckpointError where a file ends too early.
    """
    if 0 in tensor.shape:
        return
    first, stop = rows or (0, tensor.shape[0] if tensor.shape else 1)
    step = max(1, BUFFER // (math.prod(tensor.shape[1:]) * dtype.itemsize))
    for begin in range(first, stop, step):
        inner = tensor.shape[1:]
        held = Box((begin, *[0] * len(inner)), (min(step, stop - begin), *inner)) if tensor.shape else Box((), ())
        block = torch.empty(held.sizes, dtype=dtype)
        for chunk in tensor.chunks:
            part = overlap(held, chunk.box)
            if part is not None:
                read_part(files.open(chunk.file), tensor, chunk, part, block[within(part, held)])
        yield block


def whole_reads(manifest: Manifest, names: Iterable[str]) -> list[Read]:
    """The reads of all chunks of these tensors, file by file, as `check_hashes` takes them."""
    stored = ((name, manifest.tensors[name]) for name in names)
    reads = [Read(name, tensor, chunk, chunk.box, chunk.box) for name, tensor in stored for chunk in tensor.chunks]
    return sorted(reads, key=lambda read: (read.chunk.file, read.chunk.start))
