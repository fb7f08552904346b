"""Boxes overlap and tile as sets of indices say they do."""

import itertools
import random

import pytest

from softmoe_train.checkpoint.layout import Box, overlap, tiling_fault, within


def indices(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(first, first + size) for first, size in zip(box.offsets, box.sizes))))


def random_box(draw: random.Random) -> Box:
    return Box(tuple(draw.randrange(3) for _ in range(2)), tuple(draw.randrange(4) for _ in range(2)))


def test_overlap_is_the_set_of_shared_indices() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b = random_box(draw), random_box(draw)
        shared = overlap(a, b)
        assert (indices(shared) if shared else set()) == indices(a) & indices(b)


def test_a_part_is_found_within_the_whole() -> None:
    assert within(Box((5, 2), (2, 1)), Box((4, 0), (4, 8))) == (slice(1, 3), slice(2, 3))


def test_a_fault_is_found_exactly_where_boxes_do_not_tile() -> None:
    draw = random.Random(1)
    verdicts = []
    for _ in range(2000):
        boxes = [Box((first, 0), (size, 2)) for first, size in ((draw.randrange(4), draw.randrange(4)) for _ in "abc")]
        counted = sorted(index for box in boxes for index in indices(box))
        tiles = counted == sorted(itertools.product(range(4), range(2)))
        assert (tiling_fault((4, 2), boxes) is None) == tiles, boxes
        verdicts.append(tiles)
    assert 20 < sum(verdicts) < 1980


@pytest.mark.parametrize(
    ("shape", "boxes", "words"),
    [
        ((4,), [Box((0,), (3,))], "hold 3 of 4"),
        ((4,), [Box((0,), (3,)), Box((2,), (2,))], "overlap"),
        ((4,), [Box((0,), (4,)), Box((4,), (1,))], "outside"),
        ((4,), [Box((0, 0), (4, 1))], "dims"),
        ((2, 2), [Box((0, 0), (2, 1)), Box((0, 0), (1, 2)), Box((1, 1), (1, 1))], "overlap"),
        ((), [Box((), ()), Box((), ())], "overlap"),
        ((), [], "hold 0 of 1"),
    ],
)
def test_the_fault_says_what_is_wrong(shape: tuple[int, ...], boxes: list[Box], words: str) -> None:
    assert words in str(tiling_fault(shape, boxes))
