"""This file owns which images of a train pool are drawn: keyed permutations of each class, by seed, label and the order of the index alone."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.keyed import chain, permute, place_number


class Drawn(NamedTuple):
    """Samples of a pool (ascending numbers), and each one's place in the permutation of its class: k shots are the places below k."""

    numbers: NDArray[np.int64]
    places: NDArray[np.int64]


def draw(
    labels: NDArray[np.int64], numbers: NDArray[np.int64], *, purpose: str, seed: int, repeat: int, most: int
) -> Drawn:
    """The first `most` images of each class, fewer where it has fewer, of the samples `numbers` of a pool with `labels`.

    Nested: what is drawn with a smaller `most` is drawn with a larger one, in the same places.
    """
    found, places = [], []
    for label in np.unique(labels[numbers]).tolist():
        of_class = numbers[labels[numbers] == label]
        key = chain(place_number(purpose), seed, repeat, label)
        at = permute(np.arange(len(of_class)), len(of_class), key)
        taken = at < most
        found.append(of_class[taken])
        places.append(at[taken])
    every, place = np.concatenate(found), np.concatenate(places)
    order = np.argsort(every)
    return Drawn(every[order], place[order])
