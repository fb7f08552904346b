import pytest
import torch

from softmoe_train.bench.rounds import Side, Spread, Timings, measure

CPU = torch.device("cpu")


def test_sides_take_turns_in_reversed_order_and_each_is_reset_before_the_next() -> None:
    calls: list[str] = []
    sides = [
        Side(name, lambda name=name: calls.append(name), lambda name=name: calls.append(f"-{name}")) for name in "ab"
    ]
    timings = measure(sides, device=CPU, rounds=2, warmup=1, ready=lambda: calls.append("r"), after=lambda: calls.append("."))  # fmt: skip
    assert "".join(calls) == "ra-arb-b.rb-bra-a.ra-arb-b."
    assert {name: len(values) for name, values in timings.seconds.items()} == {"a": 2, "b": 2}
    assert all(value > 0 for values in timings.seconds.values() for value in values)


def test_ratios_and_differences_are_of_each_round() -> None:
    timings = Timings({"ours": [1.0, 2.0, 10.0], "other": [2.0, 2.0, 10.0]}, {"ours": [4.0], "other": [8.0]})
    assert timings.ratio("other", "ours").median == 1.0
    assert timings.ratio("other", "ours").high == 1.5
    assert timings.cpu_ratio("other", "ours").median == 2.0
    assert timings.share(threads=2) == 12 / (2 * 27)
    assert timings.difference("other", "ours") == Spread(0.0, 0.0, 0.5)


def test_quartiles_are_those_of_the_values() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_side_that_raises_ends_the_measurement() -> None:
    with pytest.raises(ZeroDivisionError):
        measure([Side("a", lambda: 1 / 0, lambda: None)], device=CPU, rounds=1, warmup=0)
