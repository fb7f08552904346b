"""This file owns the bytes: one rank's tensors as a safetensors file, written and read through a small buffer."""

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.layout import Box, within
from softmoe_train.checkpoint.manifest import DTYPES, StoredChunk, StoredTensor, described, experts_of

BUFFER = 16 * 2**20  # bytes
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Part(NamedTuple):
    """A box of a tensor to be written; `data` is called at its turn, so that one part is in memory at a time."""

    name: str
    box: Box
    dtype: torch.dtype
    data: Callable[[], Tensor]


def write_shard(path: Path, parts: Sequence[Part]) -> list[StoredChunk]:
    """Write `parts` as a new safetensors file, flushed to the disk, and return their chunks in the order of `parts`.

    Torch's own HuggingFaceStorageReader reads the file too. Beyond the parts themselves it needs one buffer.
    """
    # Widest items first keeps every tensor aligned to its items.
    order = sorted(range(len(parts)), key=lambda i: (-parts[i].dtype.itemsize, parts[i].name))
    header, starts = _header([parts[i] for i in order])
    chunks: dict[int, StoredChunk] = {}
    with path.open("xb") as file:
        file.write(header)
        for i, start in zip(order, starts):
            name, box = parts[i].name, parts[i].box
            assert file.tell() == start, (name, file.tell(), start)
            sha256 = _write_tensor(file, name, parts[i])
            chunks[i] = StoredChunk(
                offsets=box.offsets, sizes=box.sizes, file=path.name, start=start, sha256=sha256,
                experts=experts_of(name, box),
            )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    return [chunks[i] for i in range(len(parts))]


def chunk_fault(file: io.BufferedReader, name: str, tensor: StoredTensor, chunk: StoredChunk) -> str | None:
    """What is wrong with the stored bytes of a chunk, or None where they have the hash of the manifest."""
    digest, left = hashlib.sha256(), tensor.num_bytes(chunk)
    file.seek(chunk.start)
    while left:
        block = file.read(min(left, BUFFER))
        if not block:
            return f"{chunk.file} ends before {described(name, chunk)}"
        digest.update(block)
        left -= len(block)
    if digest.hexdigest() != chunk.sha256:
        return f"{chunk.file}: the bytes of {described(name, chunk)} are not those that were saved (sha256 differs)"
    return None


def read_part(file: io.BufferedReader, tensor: StoredTensor, chunk: StoredChunk, part: Box, target: Tensor) -> None:
    """Copy the `part` of a stored chunk into `target`, which has its size, through a buffer (or one row of dim 0)."""
    if not part.sizes:
        part, held, target = Box((0,), (1,)), Box((0,), (1,)), target.view(1)
    else:
        held = chunk.box
    rows, *columns = within(part, held)
    shape, dtype = held.sizes[1:], DTYPES[tensor.dtype]
    row_bytes = math.prod(shape) * dtype.itemsize
    step = max(1, BUFFER // row_bytes)
    for first in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - first)
        file.seek(chunk.start + first * row_bytes)
        data = bytearray(count * row_bytes)
        if file.readinto(data) != len(data):
            raise CheckpointError("the checkpoint changed while it was read", [f"{chunk.file} ends too early"])
        block = torch.frombuffer(data, dtype=dtype).view(count, *shape)
        target[first - rows.start : first - rows.start + count].copy_(block[(slice(None), *columns)])


def read_header(path: Path) -> dict[str, dict]:
    """The header of a safetensors file; raises ValueError where it is not one."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > path.stat().st_size - 8:
            raise ValueError(f"a header of {length} bytes does not fit the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("the header is not an object of objects")
    return header


def header_entry(tensor: StoredTensor, chunk: StoredChunk, data_start: int) -> dict[str, object]:
    """What a file's header must say of a chunk, where the data begins at byte `data_start`."""
    begin = chunk.start - data_start
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(chunk.sizes),
        "data_offsets": [begin, begin + tensor.num_bytes(chunk)],
    }


def _header(parts: Sequence[Part]) -> tuple[bytes, list[int]]:
    offsets = {part.name: {"saved_offsets": part.box.offsets} for part in parts}
    assert len(offsets) == len(parts), "a file holds one chunk of a tensor"
    # The three keys that torch's writer sets and its reader looks for.
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    }
    begins, end = [], 0
    for part in parts:
        begins.append(end)
        end += math.prod(part.box.sizes) * part.dtype.itemsize
        kind = NAMES[str(part.dtype).removeprefix("torch.")]
        entries[part.name] = {"dtype": kind, "shape": part.box.sizes, "data_offsets": [begins[-1], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + begin for begin in begins]


def _write_tensor(file: io.BufferedWriter, name: str, part: Part) -> str:
    tensor = part.data()
    if tuple(tensor.shape) != part.box.sizes or tensor.dtype != part.dtype:
        raise CheckpointError("cannot save", [f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {part.box.sizes}"])
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest = hashlib.sha256()
    for begin in range(0, len(data), BUFFER):
        digest.update(data[begin : begin + BUFFER])
        file.write(data[begin : begin + BUFFER])
    return digest.hexdigest()
