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
    """The box of the global tensor that this rank holds (all of it for a plain tensor, nothing outside the mesh).

    Raises CheckpointError for a layout whose local part is not one box, or not the box that DTensor reports.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    if tensor.device_mesh.get_coordinate() is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    _refuse_uneven_strides(name, tensor)
    chunks = tensor.__create_chunk_list__()
    box = Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes))
    if len(chunks) != 1 or box.sizes != tuple(tensor.to_local().shape):
        held = tuple(tensor.to_local().shape)
        raise CheckpointError("unsupported layout", [f"{name} reports chunks {chunks} but holds a tensor of {held}"])
    return box


def _refuse_uneven_strides(name: str, tensor: DTensor) -> None:
    # FSDP2 over an expert DTensor cuts what `ep` left, but records the cut as a strided shard of the whole. The two
    # agree only for even cuts: 6 experts on ep 2 x dp 2 would be saved with experts 3, 4, 5 in the wrong places.
    mesh, dims = tensor.device_mesh, [getattr(placement, "dim", -1) for placement in tensor.placements]
    for axis, placement in enumerate(tensor.placements):
        factor = getattr(placement, "split_factor", None)
        if factor is None:
            continue
        cuts = {i: mesh.size(i) for i, dim in enumerate(dims) if dim == dims[axis]}
        inner, size = math.prod(n for i, n in cuts.items() if i > axis), tensor.shape[dims[axis]]
        if factor != inner or size % math.prod(cuts.values()):
            rule = f"dim {dims[axis]} has size {size} and is cut {list(cuts.values())} ways with a stride of {factor}"
            remedy = "make the size a multiple of the cuts, or shard another dim"
            raise CheckpointError("unsupported layout", [f"{name}: {rule}, which is no contiguous part; {remedy}"])
