"""This file owns keyed randomness on the device: numbers derived from (seed, global sample, place), never drawn.

splitmix64 (Steele, Lea and Flood 2014) on int64 tensors, whose products wrap; the same numbers on every device and layout.
B images  N rows  H values of a row
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


@torch.compiler.assume_constant_result
def _place_number(place: str) -> int:
    return _signed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little"))


def keys_within(keys: Int64[Tensor, "*B"], shape: tuple[int, ...]) -> Int64[Tensor, "..."]:
    """Keys of the parts of what each key stands for, `shape` of them (shape *B *shape): the i-th depends on the key and i alone."""
    # ^ 0: inductor takes arange times a number for an index, which must not wrap (torch 2.13).
    counter = (torch.arange(1, torch.Size(shape).numel() + 1, device=keys.device) ^ 0).view(shape)
    return _mix(keys.reshape(*keys.shape, *(1,) * len(shape)) + counter * _GOLDEN)


def uniform(keys: Int64[Tensor, "*B"], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Numbers of (0, 1), float32, `shape` of them for each key (shape *B *shape): the i-th depends on the key and i alone."""
    return (_shifted(keys_within(keys, shape), 41).float() + 0.5) * 2.0**-23


def normal(keys: Int64[Tensor, "*B"], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Numbers of N(0, 1), float32, by the inverse of its distribution: at most 5.3 from 0."""
    return torch.special.ndtri(uniform(keys, shape))


def dropout(values: Float[Tensor, "*N H"], keys: Int64[Tensor, "*N"], rate: float) -> Float[Tensor, "*N H"]:
    """Zero each value with probability `rate` (a multiple of 2^-16 is the nearest), and enlarge the others by 1 / (1 - rate).

    The i-th of a row depends on the row's key and i alone. One number serves four values: 16 bits each.
    """
    steps = min(round(rate * 2**16), 2**16 - 1)
    H = values.shape[-1]
    pieces = keys_within(keys, (-(-H // 4),)).view(torch.int16)[..., :H]
    return values * (pieces >= steps - 2**15) * (1 / (1 - steps / 2**16))


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of the unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MULTIPLY[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLY[1]
    return x ^ _shifted(x, 31)
