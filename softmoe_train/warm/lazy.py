"""This file owns tensors that lie in files: read part by part, float32, and made into others without being read whole.

Nothing is read before `read` is called, and then what the asked part needs: a rank that holds a shard reads that shard.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softmoe_train.checkpoint.layout import Box
from softmoe_train.model.init import InitRule, LocalPart, fill_part, normal


class Lazy(NamedTuple):
    """A tensor of `shape`, of which `read` gives any box, and the stored tensors that it is made from."""

    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]
    origin: tuple[str, ...]


def all_of(shape: Sequence[int]) -> Box:
    """The box of the whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def window(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))


def transposed(t: Lazy) -> Lazy:
    """A matrix with its dims exchanged."""
    return t._replace(shape=t.shape[::-1], read=lambda box: t.read(Box(box.offsets[::-1], box.sizes[::-1])).mT)


def entry(t: Lazy, index: int) -> Lazy:
    """One entry of dim 0, without that dim."""
    return Lazy(
        t.shape[1:],
        lambda box: t.read(Box((index, *box.offsets), (1, *box.sizes)))[0],
        tuple(f"{name}[{index}]" for name in t.origin),
    )


def below(t: Lazy, first: int) -> Lazy:
    """The rows from `first` on."""
    return t._replace(
        shape=(t.shape[0] - first, *t.shape[1:]),
        read=lambda box: t.read(Box((box.offsets[0] + first, *box.offsets[1:]), box.sizes)),
    )


def reshaped_rows(t: Lazy, shape: tuple[int, ...]) -> Lazy:
    """The same rows of dim 0, each of another shape; rows are read whole."""
    assert t.shape[0] == shape[0], (t.shape, shape)

    def read(box: Box) -> Tensor:
        rows = t.read(Box((box.offsets[0], *[0] * (len(t.shape) - 1)), (box.sizes[0], *t.shape[1:])))
        inner = window(Box(box.offsets[1:], box.sizes[1:]))
        return rows.reshape(box.sizes[0], *shape[1:])[(slice(None), *inner)]

    return t._replace(shape=shape, read=read)


def computed(t: Lazy, shape: tuple[int, ...], compute: Callable[[Tensor], Tensor]) -> Lazy:
    """What `compute` makes of the whole tensor, for small ones: every reader reads all of it."""
    return t._replace(shape=shape, read=lambda box: compute(t.read(all_of(t.shape)))[window(box)])


def joined(parts: Sequence[Lazy]) -> Lazy:
    """Tensors one after another along dim 0; only those that a box touches are read."""

    def read(box: Box) -> Tensor:
        pieces, begin = [], 0
        for t in parts:
            first, last = max(box.offsets[0], begin), min(box.offsets[0] + box.sizes[0], begin + t.shape[0])
            if first < last:
                pieces.append(t.read(Box((first - begin, *box.offsets[1:]), (last - first, *box.sizes[1:]))))
            begin += t.shape[0]
        return torch.cat(pieces)

    rows = sum(t.shape[0] for t in parts)
    return Lazy((rows, *parts[0].shape[1:]), read, tuple(name for t in parts for name in t.origin))


def copies(t: Lazy, count: int) -> Lazy:
    """`count` times the same tensor, along a new dim 0; it is read once."""

    def read(box: Box) -> Tensor:
        return t.read(Box(box.offsets[1:], box.sizes[1:])).expand(box.sizes)

    return t._replace(shape=(count, *t.shape), read=read)


def picked(t: Lazy, indices: Sequence[int]) -> Lazy:
    """These entries of dim 0, each read by itself."""

    def read(box: Box) -> Tensor:
        chosen = indices[box.offsets[0] : box.offsets[0] + box.sizes[0]]
        return torch.cat([t.read(Box((i, *box.offsets[1:]), (1, *box.sizes[1:]))) for i in chosen])

    return t._replace(shape=(len(indices), *t.shape[1:]), read=read)


def noisy(t: Lazy, std: float, *, seed: int, name: str, per_expert: bool) -> Lazy:
    """Each element times 1 + N(0, std²), drawn from (seed, name) and, where dim 0 is the expert, the expert: the same on any layout."""
    if std == 0:
        return t
    rule = InitRule(normal(std), "independent" if per_expert else "none")

    def read(box: Box) -> Tensor:
        factor = torch.empty(box.sizes)
        fill_part(LocalPart(factor, box.offsets), t.shape, rule, seed, f"warm/{name}")
        return t.read(box) * factor.add_(1.0)

    return t._replace(read=read)
