"""How a proof measures: what counts, what is chance, what can never pass."""

import math

import pytest
import torch

from softmoe_train.parity.measure import Moved, Row, distance, fingerprint, least_sizes, move_distance, relative
from softmoe_train.parity.table import verdict

ROUNDING = 2 * 2.0**-24  # two of float32


def test_a_distance_is_relative_to_what_is_wanted() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert distance(want.float(), want) == 0
    assert distance(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [torch.full((2,), math.nan), torch.full((2,), math.inf), torch.zeros(3)])
def test_what_is_no_number_or_of_another_shape_never_passes(bad: torch.Tensor) -> None:
    row = Row("gradients", 1e30, {"w": distance(bad, torch.ones(2))})
    assert row.failing == ["w"] or row.errors["w"] == math.inf


def test_an_error_against_zero_is_infinite() -> None:
    assert relative(0.0, 0.0) == 0
    assert relative(1e-9, 0.0) == math.inf
    assert distance(torch.full((2,), 1e-9), torch.zeros(2)) == math.inf


def test_a_wrong_step_counts_by_its_gradient() -> None:
    before, gradient = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 1e-9])
    want = -0.01 * gradient.sign()
    chance = want.clone()
    chance[3] *= -1  # a sign that rounding decides
    assert move_distance(chance, Moved(want, before, gradient, ROUNDING)) < 1e-8
    wrong = want.clone()
    wrong[0] *= -1
    assert move_distance(wrong, Moved(want, before, gradient, ROUNDING)) == pytest.approx(2 / 3)
    assert move_distance(want * 1.01, Moved(want, before, gradient, ROUNDING)) == pytest.approx(0.01, rel=1e-3)


def test_what_float32_cannot_store_does_not_count() -> None:
    before = torch.ones(8, dtype=torch.float64)
    want = before - 1.23456789e-4
    gradient = torch.ones(8)
    assert move_distance(want.float(), Moved(want, before, gradient, ROUNDING)) == 0
    assert move_distance(want.float() + 1e-6, Moved(want, before, gradient, ROUNDING)) > 1e-3


def test_a_tensor_of_next_to_nothing_is_measured_by_its_share_of_the_whole() -> None:
    large, tiny, other = torch.full((4,), 2.0), torch.full((4,), 1e-9), torch.full((4,), 8.0)
    want = {"optimizer.exp_avg.a": large, "optimizer.exp_avg.b": tiny, "optimizer.exp_avg_sq.a": other}
    least = least_sizes(want, 1e-3)
    assert least["optimizer.exp_avg.a"] == least["optimizer.exp_avg.b"] == pytest.approx(4e-3)
    assert least["optimizer.exp_avg_sq.a"] == pytest.approx(16e-3)
    assert distance(2 * tiny, tiny, least["optimizer.exp_avg.b"]) == pytest.approx(5e-7)
    assert distance(large * 1.01, large, least["optimizer.exp_avg.a"]) == pytest.approx(0.01, rel=1e-5)
    moves = {name: Moved(t + 0.1, t, t, 0.0) for name, t in (("a", large), ("b", tiny))}
    assert least_sizes(moves, 1e-3)["b"] == pytest.approx(1e-3 * 4 * 2 * 0.1, rel=1e-3)


def test_the_worst_and_the_first_that_backward_reaches() -> None:
    row = Row("gradients", 1e-5, {"embed": 0.3, "router": 0.2, "experts": 1e-7})
    assert row.worst == "embed"
    assert row.failing == ["router", "embed"]
    assert Row("gradients", 1e-5, {"a": 0.3, "b": math.nan}).worst == "b"


def test_the_verdict_names_the_parameter_before_the_number() -> None:
    rows = [Row("loss", 1e-6, {"": 0.1}), Row("gradients", 1e-5, {"embed": 0.3, "router": 0.2, "head": 0.0})]
    assert verdict(rows).splitlines() == [
        "parity FAILS: gradients router is off by 2.0e-01, allowed 1e-05",
        "2 of 3 fail; this one backward reaches first: the cause is there or just behind it",
        "1 other row fails too",
    ]
    assert verdict([Row("loss", 1e-6, {"": 0.0})]) == "parity holds: 1 comparisons in 1 rows"
    assert verdict(rows[:1]) == "parity FAILS: loss is off by 1.0e-01, allowed 1e-06"


def test_a_fingerprint_tells_any_bit_and_any_order() -> None:
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mark = fingerprint(whole)
    assert torch.equal(mark, fingerprint(whole.clone()))
    swapped, nudged = whole.clone(), whole.clone()
    swapped[[3, 700]] = swapped[[700, 3]]
    nudged[999] = torch.nextafter(nudged[999], torch.tensor(9.0))
    for other in (swapped, nudged, whole.flip(0)):
        assert not torch.equal(mark, fingerprint(other))
