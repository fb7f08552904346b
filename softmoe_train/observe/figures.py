"""This file owns what an evaluator may show beside numbers: pictures and histograms, in memory until a log takes them."""

from typing import NamedTuple


class Picture(NamedTuple):
    """A picture for people."""

    png: bytes
    caption: str


class Histogram(NamedTuple):
    """How many values lie between each two neighbours of `edges`, which is longer by one."""

    counts: list[int]
    edges: list[float]


Figure = Picture | Histogram
