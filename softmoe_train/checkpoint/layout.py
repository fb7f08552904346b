"""This file owns boxes: which part of a global tensor a rank holds, and whether boxes tile the whole."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint.agreement import CheckpointError


class Box(NamedTuple):
    """A part of a global tensor: its first index and its size in every dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def overlap(a: Box, b: Box) -> Box | None:
    """The part of the global tensor that both boxes hold, or None where they share no element."""
    offsets = tuple(max(i, j) for i, j in zip(a.offsets, b.offsets))
    sizes = tuple(min(i + m, j + n) - k for i, m, j, n, k in zip(a.offsets, a.sizes, b.offsets, b.sizes, offsets))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where `part` lies inside a tensor that holds `whole`."""
    return tuple(slice(i - j, i - j + n) for i, j, n in zip(part.offsets, whole.offsets, part.sizes))


def tiling_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once, or None where they do."""
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"chunk {box.offsets} + {box.sizes} does not have the tensor's {len(shape)} dims"
        if any(i + n > size for i, n, size in zip(box.offsets, box.sizes, shape)):
            return f"chunk {box.offsets} + {box.sizes} lies outside the shape {shape}"
    # Sweep along the dim with the most cuts, so that few boxes are open at a time.
    sweep = max(range(len(shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}), default=None)
    opened: list[Box] = []
    for box in sorted(boxes, key=lambda box: 0 if sweep is None else box.offsets[sweep]):
        if sweep is not None:
            opened = [o for o in opened if o.offsets[sweep] + o.sizes[sweep] > box.offsets[sweep]]
        clash = next((other for other in opened if overlap(other, box)), None)
        if clash is not None:
            return f"chunks {clash.offsets} + {clash.sizes} and {box.offsets} + {box.sizes} overlap"
        opened.append(box)
    held, needed = sum(math.prod(box.sizes) for box in boxes), math.prod(shape)
    return None if held == needed else f"its chunks hold {held} of {needed} elements"


def local_box(name: str, tensor: Tensor | DTensor) -> Box:
    """The box of the global tensor that this rank holds: all of it for a plain tensor, nothing outside the mesh.

    Raises CheckpointError where DTensor, its local tensor and our own arithmetic do not agree on that box.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    reported = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]
    held, ours = tuple(tensor.to_local().shape), _box_at(tensor, coordinate)
    if ours is not None and 0 in ours.sizes and held == ours.sizes:
        return ours  # an empty part lies nowhere
    if ours is None or reported != [ours] or held != ours.sizes:
        claims = f"torch places it at {reported}, it holds {held}, and it should be {ours or 'one part'}"
        remedy = "cut another dim, or evenly"
        raise CheckpointError("unsupported layout", [f"{name} as {tensor.placements}: {claims}; {remedy}"])
    return ours


def _box_at(tensor: DTensor, coordinate: Sequence[int]) -> Box | None:
    # Worked out again because a wrong place here is an expert silently swapped for another. FSDP2 over an expert
    # DTensor cuts what `ep`, an inner axis, has left; it records that as a shard with a stride over all inner cuts.
    # So inner shards cut first, strided ones after them, each as torch.chunk does; any other stride is no one part.
    mesh, spans = tensor.device_mesh, [(0, size) for size in tensor.shape]
    dims = [getattr(placement, "dim", None) for placement in tensor.placements]
    strides = [getattr(placement, "split_factor", None) for placement in tensor.placements]
    for axis, stride in enumerate(strides):
        if stride is not None and stride != math.prod(
            mesh.size(inner) for inner in range(axis + 1, mesh.ndim) if dims[inner] == dims[axis]
        ):
            return None
    plain = [axis for axis, stride in enumerate(strides) if stride is None]
    strided = [axis for axis, stride in enumerate(strides) if stride is not None]
    for axis in plain + strided[::-1]:
        dim = dims[axis]
        if dim is None:
            continue
        first, size = spans[dim]
        piece = -(-size // mesh.size(axis))
        begin = min(size, coordinate[axis] * piece)
        spans[dim] = (first + begin, min(piece, size - begin))
    return Box(tuple(first for first, _ in spans), tuple(size for _, size in spans))
