"""The moving average of the weights against its recursion in float64."""

import pytest
import torch
from torch import Tensor

from softmoe_train.optim.average import AverageConfig, WeightAverage


def weights(step: int) -> dict[str, Tensor]:
    return {
        "head.weight": torch.linspace(-1, 1, 12).view(3, 4) * (1 + 0.3 * step),
        "head.bias": torch.full((3,), step / 7),
    }


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_its_recursion_and_leaves_skipped_updates_alone(warmup: bool) -> None:
    average = WeightAverage(AverageConfig(decay=0.9, warmup=warmup), weights(0))
    truth = {name: value.double() for name, value in weights(0).items()}
    updates = 0
    for step in range(1, 120):
        skipped = step % 4 == 0
        average.update(weights(step), torch.tensor(float(skipped)))
        if skipped:
            continue
        updates += 1
        keep = min(0.9, (1 + updates) / (10 + updates)) if warmup else 0.9
        truth = {name: keep * value + (1 - keep) * weights(step)[name].double() for name, value in truth.items()}
    assert average.updates.tolist() == [updates]
    for name, value in truth.items():
        torch.testing.assert_close(average.values[name].double(), value, rtol=1e-6, atol=1e-6)


def test_an_update_that_was_skipped_changes_no_bit() -> None:
    average = WeightAverage(AverageConfig(decay=0.9, warmup=True), weights(1))
    before = {name: value.clone() for name, value in average.values.items()}
    average.update(weights(5), torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in average.values.items())
    assert average.updates.tolist() == [0.0]


def test_weights_and_average_change_places_and_return_bit_for_bit() -> None:
    live = weights(3)
    average = WeightAverage(AverageConfig(decay=0.9, warmup=False), weights(0))
    average.swap(live)
    assert all(torch.equal(live[name], value) for name, value in weights(0).items())
    average.swap(live)
    assert all(torch.equal(live[name], value) for name, value in weights(3).items())
    assert all(torch.equal(average.values[name], value) for name, value in weights(0).items())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        AverageConfig(decay=decay, warmup=False)
