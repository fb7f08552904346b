"""This file owns counting bytes: what a forward keeps for its backward, and the most that is alive at once."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.plan.tally import Tally


class Memory(NamedTuple):
    """Bytes of one forward and backward, beside the parameters and what was there before."""

    saved: int  # kept for backward: distinct storages, parameters excluded, the input included
    saved_weights: int  # the part of `saved` that is shaped as a parameter is: its copies in another dtype, say
    peak: int  # most alive at once, gradients included, as tensors; on CUDA as the allocator has it


def count_memory(
    forward: Callable[[], Tensor], parameters: Iterable[Tensor], gradient: Tensor, device: torch.device
) -> Memory:
    """Run forward and backward once and count; the gradients are left where they are."""
    own = list(parameters)
    saved = _Saved(own)
    live = Tally()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with live:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            output = forward()
        torch.autograd.backward(output, gradient)
        del output
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else live.peak
    return Memory(saved.total(), saved.total(weights=True), peak)


class _Saved:
    """Sees every tensor that autograd keeps."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.shapes = {tuple(p.shape) for p in parameters if p.ndim == 3}
        self.bytes: dict[int, tuple[int, bool]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.bytes[storage.data_ptr()] = (storage.nbytes(), _plain_shape(tensor) & self.shapes != set())
        return tensor

    def total(self, *, weights: bool = False) -> int:
        return sum(size for size, is_weight in self.bytes.values() if is_weight or not weights)


def _plain_shape(tensor: Tensor) -> set[tuple[int, ...]]:
    """The shape, also as it is where the last two dims are transposed."""
    return {tuple(tensor.shape), tuple(tensor.mT.shape)} if tensor.ndim >= 2 else {tuple(tensor.shape)}
