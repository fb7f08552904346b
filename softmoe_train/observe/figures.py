"""This file owns what an evaluator may show or say beside numbers: pictures and histograms, in memory until a log takes them, and alarms."""

from typing import NamedTuple


class Picture(NamedTuple):
    """A picture for people."""

    png: bytes
    caption: str


class Histogram(NamedTuple):
    """How many values lie between each two neighbours of `edges`, which is longer by one."""

    counts: list[int]
    edges: list[float]


class Alarm(NamedTuple):
    """What people should hear of although nobody watches."""

    title: str
    text: str


Figure = Picture | Histogram
Said = float | Figure | Alarm
