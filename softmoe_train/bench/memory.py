"""This file owns counting bytes: what a forward keeps for its backward, and the most that is alive at once."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    live = _Live()
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


class _Live(TorchDispatchMode):
    """Adds up the storages that operators make, and takes off those that die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), known)
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = id(storage)  # one Python object for as long as the storage lives
        if key in known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
