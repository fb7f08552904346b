"""This file owns the bytes: one rank's tensors as a safetensors file, written and read through a small buffer."""

import io
import json
import math
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.folder import lasting
from softmoe_train.checkpoint.layout import Box, within
from softmoe_train.checkpoint.manifest import DTYPES, MANIFEST, Stored, StoredChunk, StoredTensor, described, experts_of
from softmoe_train.checkpoint.remote import Place

BUFFER = 16 * 2**20  # bytes
BLOCK = 2**20  # bytes that a processor's cache holds: they are looked at, hashed and written while they are there
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Part(NamedTuple):
    """A box of a tensor that is to be written."""

    name: str
    box: Box
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.box.sizes) * self.dtype.itemsize


class ShardLayout(NamedTuple):
    """One rank's file: its header, then the bytes of its parts in this order, each from byte `begins` of the data on."""

    header: bytes
    parts: tuple[Part, ...]
    begins: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the data."""
        return sum(part.num_bytes for part in self.parts)


def shard_layout(parts: Sequence[Part]) -> ShardLayout:
    """The file that holds `parts`, which may be none."""
    # Widest items first keeps every tensor aligned to its items, in the file and in memory.
    ordered = tuple(sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name)))
    begins = tuple(accumulate((part.num_bytes for part in ordered[:-1]), initial=0)) if ordered else ()
    return ShardLayout(_header(ordered, begins), ordered, begins)


def write_shard(path: Place, shard: ShardLayout, data: Tensor) -> tuple[list[StoredChunk], list[str]]:
    """Write a new safetensors file, flushed to the disk, whose data is the bytes of `data`.

    Returns its chunks, and the names of the tensors that hold an infinity or a NaN. Torch's own HuggingFaceStorageReader reads the
    file too.
    """
    assert data.dtype == torch.uint8 and len(data) == shard.num_bytes, (data.dtype, len(data), shard.num_bytes)
    chunks, bad = [], []
    with lasting(path, "xb") as file:
        file.write(shard.header)
        for part, begin in zip(shard.parts, shard.begins):
            start, digest, finite = file.tell(), xxh3_128(), True
            for block in data[begin : begin + part.num_bytes].split(BLOCK):
                finite = finite and _is_finite(block.view(part.dtype))
                digest.update(block.numpy().data)
                file.write(block.numpy().data)
            bad += [] if finite else [part.name]
            chunks.append(
                StoredChunk(
                    offsets=part.box.offsets, sizes=part.box.sizes, file=path.name, start=start, xxh128=digest.hexdigest(),
                    experts=experts_of(part.name, part.box),
                )
            )  # fmt: skip
    return chunks, bad


def chunk_fault(file: io.BufferedIOBase, name: str, tensor: StoredTensor, chunk: StoredChunk) -> str | None:
    """What is wrong with the stored bytes of a chunk, or None where they have the hash of the manifest."""
    digest, left = xxh3_128(), tensor.num_bytes(chunk)
    file.seek(chunk.start)
    while left:
        block = file.read(min(left, BUFFER))
        if not block:
            return f"{chunk.file} ends before {described(name, chunk)}"
        digest.update(block)
        left -= len(block)
    if digest.hexdigest() != chunk.xxh128:
        return f"{chunk.file}: the bytes of {described(name, chunk)} are not those that were saved (their hash differs)"
    return None


def read_part(file: io.BufferedIOBase, tensor: StoredTensor, chunk: StoredChunk, part: Box, target: Tensor) -> None:
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


def header_fault(file: io.BufferedIOBase, name: str, held: Sequence[Stored]) -> str | None:
    """What is wrong with the header of the file `name` that holds `held`, or None.

    The manifest decides every byte of a header, so no hash of it is kept: it is written again and compared.
    """
    shard = shard_layout([Part(tensor, chunk.box, DTYPES[stored.dtype]) for tensor, stored, chunk in held])
    starts = {part.name: len(shard.header) + begin for part, begin in zip(shard.parts, shard.begins)}
    file.seek(0)
    there = file.read(len(shard.header))
    if there == shard.header and all(chunk.start == starts[tensor] for tensor, _, chunk in held):
        return None
    entries, expected = _entries(there), _entries(shard.header) or {}
    if entries is None:
        return f"{name} is no safetensors file: its header cannot be read"
    names = sorted(key for key in {*entries, *expected} if entries.get(key) != expected.get(key))
    return f"{name}: its header and {MANIFEST} differ" + (f" in {', '.join(names)}" if names else "")


def _entries(header: bytes) -> dict[str, object] | None:
    """What a header says by name, None where it is none."""
    try:
        length = struct.unpack("<Q", header[:8])[0]
        entries = json.loads(header[8:]) if length == len(header) - 8 else None
    except ValueError:
        return None
    return entries if isinstance(entries, dict) else None


def _header(parts: Sequence[Part], begins: Sequence[int]) -> bytes:
    offsets = {part.name: {"saved_offsets": part.box.offsets} for part in parts}
    assert len(offsets) == len(parts), "a file holds one chunk of a tensor"
    # The three keys that torch's writer sets and its reader looks for.
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    }
    for part, begin in zip(parts, begins):
        kind = NAMES[str(part.dtype).removeprefix("torch.")]
        span = [begin, begin + part.num_bytes]
        entries[part.name] = {"dtype": kind, "shape": part.box.sizes, "data_offsets": span}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _is_finite(values: Tensor) -> bool:
    # One pass and no second tensor: the least or the greatest is not finite where any is (NaN counts as both).
    if not values.dtype.is_floating_point or not len(values):
        return True
    return all(math.isfinite(value.item()) for value in torch.aminmax(values))
