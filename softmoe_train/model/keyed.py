"""This file owns keyed randomness on the device: numbers derived from (seed, global sample, place), never drawn.

splitmix64 (Steele, Lea and Flood 2014) on int64 tensors, whose products wrap; the same numbers on every device and layout.
B images
"""

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def image_keys(seed: int, sample_ids: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """A key of each global sample under the seed of a run."""
    return _mix(_mix(sample_ids.new_full((), _signed(seed)) + _GOLDEN) ^ sample_ids)


def keys_at(keys: Int64[Tensor, "..."], place: str) -> Int64[Tensor, "..."]:
    """The keys of one place where randomness is used, as a layer and what it does there: no two places share numbers."""
    return _mix(keys ^ _place_number(place))


def uniform(keys: Int64[Tensor, "*B"], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Numbers of (0, 1), float32, `shape` of them for each key (shape *B *shape): the i-th depends on the key and i alone."""
    count = torch.Size(shape).numel()
    # ^ 0: inductor takes arange times a number for an index, which must not wrap (torch 2.13).
    counter = (torch.arange(1, count + 1, device=keys.device) ^ 0).view(shape)
    bits = _mix(keys.reshape(*keys.shape, *(1,) * len(shape)) + counter * _GOLDEN)
    return (_shifted(bits, 41).float() + 0.5) * 2.0**-23


def normal(keys: Int64[Tensor, "*B"], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Numbers of N(0, 1), float32, by the inverse of its distribution: at most 5.3 from 0."""
    return torch.special.ndtri(uniform(keys, shape))


@torch.compiler.assume_constant_result
def _place_number(place: str) -> int:
    return _signed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little"))


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of the unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MULTIPLY[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLY[1]
    return x ^ _shifted(x, 31)
