"""This file owns the Pareto front: which of some models nothing beats at their cost."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places in `points`, which are (cost, quality), of those that none costs less than and is as good, or is better at no more cost.

    In the order of their cost. Of equal points all are on the front.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
