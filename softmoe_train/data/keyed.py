"""This file owns keyed randomness: hashes, uniform numbers and permutations derived from integers, never drawn.

Everything is splitmix64 (Steele, Lea and Flood 2014) on 64-bit integers, written out here, so that the numbers
depend on no library's version: the same key gives the same number for ever, on every machine, rank and worker.
"""

from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ONES = 0xFFFFFFFFFFFFFFFF
# A pair of elements is nearly independent after about log2(size) + 10 rounds: 32 serve windows of millions.
_ROUNDS = 32


def mix(values: U64) -> U64:
    """The splitmix64 finaliser: a bijection of 64-bit integers without visible structure."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLY[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLY[1])
    return values ^ (values >> np.uint64(31))


def _mix_one(value: int) -> int:
    """`mix` of one integer."""
    value = ((value ^ (value >> 30)) * _MULTIPLY[0]) & _ONES
    value = ((value ^ (value >> 27)) * _MULTIPLY[1]) & _ONES
    return value ^ (value >> 31)


def chain(*parts: int | NDArray[np.int64] | U64) -> U64:
    """One 64-bit key for each row of the broadcast integers `parts`, whose order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        part = np.asarray(part & _ONES if isinstance(part, int) else part).astype(np.uint64)
        key = mix((key ^ part) + np.uint64(_GOLDEN))
    return key


@lru_cache
def place_number(place: str) -> int:
    """A fixed 64-bit number for the name of a place where randomness is used."""
    return int.from_bytes(sha256(place.encode()).digest()[:8], "little")


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, key: U64) -> NDArray[np.int64]:
    """Where a keyed permutation of range(size) sends `index`, for each row on its own and in memory O(rows).

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012): each round pairs x with (k - x) mod size and a keyed bit
    of the pair decides whether they change places, so every round is a bijection for any size.
    """
    x, size = index, np.asarray(size, np.int64)
    rounds = np.arange(1, 2 * _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)
    keys = mix(key + rounds)  # one column where all rows share a key
    pivots = (keys[:_ROUNDS] % size.astype(np.uint64)).astype(np.int64)
    for pivot, salt in zip(pivots, keys[_ROUNDS:], strict=True):
        partner = pivot - x
        partner += size * (partner < 0)
        pair = np.maximum(x, partner).astype(np.uint64)
        x = np.where(mix(pair ^ salt) & np.uint64(1), partner, x)
    return x


class Draws:
    """Uniform numbers for one sample at one place: the i-th draw depends on (seed, sample, place, i) alone."""

    def __init__(self, seed: int, sample: int, place: str) -> None:
        self._state = 0
        for part in (seed, sample, place_number(place)):  # `chain`, which takes ten times as long for a single key
            self._state = _mix_one(((self._state ^ (part & _ONES)) + _GOLDEN) & _ONES)

    def uniform(self) -> float:
        """The next number of [0, 1), a multiple of 2**-53."""
        self._state = (self._state + _GOLDEN) & _ONES
        return (_mix_one(self._state) >> 11) * 2.0**-53

    def below(self, bound: int) -> int:
        """The next integer of range(bound)."""
        return int(self.uniform() * bound)
