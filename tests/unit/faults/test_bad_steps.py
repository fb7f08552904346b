"""Which steps are bad, when there are too many in a row, and which data is passed over: arithmetic on losses alone."""

import json
import math
import random
import statistics

import pytest

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.faults.bad_steps import (
    NONE_YET,
    BadData,
    BadSteps,
    BadStepsConfig,
    BadStepsError,
    Judgement,
    SeenStep,
    judge,
    past,
    refuse_to_go_back,
)

NAN = math.nan
BATCH = 8


def config(**changes: object) -> BadStepsConfig:
    return BadStepsConfig.model_validate({**load_yaml(config_folder() / "bad_steps" / "default.yaml"), **changes})


def steps(*losses: float, skipped: tuple[int, ...] = (), first: int = 1) -> list[SeenStep]:
    """One step for each loss, half of it from each of two ranks; of a loss that is not finite the second rank has all."""
    shares = [[loss / 2, loss / 2] if math.isfinite(loss) else [1.0, loss] for loss in losses]
    return [
        SeenStep(s, (s - 1) * BATCH, s * BATCH, shares[s - first], s in skipped or not math.isfinite(losses[s - first]))
        for s in range(first, first + len(losses))
    ]


def in_pieces(how: BadStepsConfig, seen: list[SeenStep], size: int) -> Judgement:
    """The judgement of looks `size` steps apart, with a save and a resume after each."""
    now, bad, skipped = NONE_YET, [], 0
    for at in range(0, len(seen), size):
        one = judge(how, now, seen[at : at + size])
        now = BadSteps.model_validate(json.loads(json.dumps(one.after.model_dump())))
        bad, skipped = bad + one.bad, skipped + one.skipped
        if one.too_much:
            return Judgement(now, bad, skipped, one.too_much)
    return Judgement(now, bad, skipped, None)


def test_a_bad_step_is_named_with_its_reason_and_its_ranks() -> None:
    said = judge(config(), NONE_YET, steps(1.0, NAN, 1.0, math.inf, 1.0, skipped=(5,)))
    assert [(b.step, b.begin, b.why, b.ranks) for b in said.bad] == [
        (2, 8, "loss", [1]), (4, 24, "loss", [1]), (5, 32, "gradient norm", [0, 1]),
    ]  # fmt: skip
    assert (said.skipped, said.too_much) == (3, None)
    assert said.bad[0].said == "the loss was not finite on rank 1, and no update was made"


def test_only_bad_steps_in_a_row_are_too_many_and_the_data_is_that_of_the_row() -> None:
    how = config(in_a_row=3)
    assert judge(how, NONE_YET, steps(NAN, NAN, 1, NAN, NAN, 1)).too_much is None
    said = judge(how, NONE_YET, steps(NAN, NAN, 1, NAN, NAN, NAN, NAN))
    assert said.too_much == BadData(first_step=4, last_step=6, begin=24, end=48)
    assert said.skipped == 5, "what comes after is not looked at"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_when_somebody_looks_changes_nothing(size: int) -> None:
    numbers = random.Random(0)
    for _ in range(20):
        losses = [numbers.choice([NAN, 9.0, numbers.gauss(2, 0.1), numbers.gauss(2, 0.1)]) for _ in range(60)]
        how = config(in_a_row=4, spike=5.0, spikes_in_a_row=3, spike_memory=10)
        assert repr(in_pieces(how, steps(*losses), size)) == repr(judge(how, NONE_YET, steps(*losses)))


def test_the_level_is_the_plain_mean_and_deviation_until_its_memory_is_full_and_leaves_bad_steps_out() -> None:
    losses = [3.0, 2.5, 2.75, NAN, 2.0, 2.25]
    level = judge(config(), NONE_YET, steps(*losses)).after.level
    good = [loss for loss in losses if math.isfinite(loss)]
    assert level.mean == pytest.approx(statistics.fmean(good), rel=1e-12)
    assert level.variance == pytest.approx(statistics.pvariance(good), rel=1e-12)
    assert level.seen == 5


def test_a_spike_is_a_loss_far_above_the_level_once_enough_was_seen() -> None:
    calm = [2.0, 2.2] * 10  # mean 2.1, deviation 0.1
    how = config(spike=6.0, spike_memory=20, spikes_in_a_row=2)
    assert judge(how, NONE_YET, steps(*calm, 2.69)).bad == []
    spiked = judge(how, NONE_YET, steps(*calm, 2.71))
    assert [(b.step, b.why, b.ranks) for b in spiked.bad] == [(21, "spike", [0, 1])]
    assert (spiked.skipped, spiked.too_much) == (0, None)
    assert judge(how, NONE_YET, steps(*calm, -50.0)).bad == [], "a loss far below is no spike"
    assert judge(how, NONE_YET, steps(*calm[1:], 9.0)).bad == [], "19 steps are too few to judge by"
    assert judge(config(), NONE_YET, steps(*calm, 9.0)).bad == [], "off by default"


def test_spikes_in_a_row_are_bad_data_too_and_steps_without_update_are_of_the_same_row() -> None:
    calm = [2.0, 2.2] * 10
    how = config(spike=6.0, spike_memory=20, spikes_in_a_row=3, in_a_row=3)
    said = judge(how, NONE_YET, steps(*calm, 5, NAN, 5, NAN, 5, 2))
    assert said.too_much == BadData(first_step=21, last_step=25, begin=160, end=200)


def test_a_run_stops_where_it_may_not_go_back_and_says_why() -> None:
    how = config(in_a_row=2)
    _, _, _, data = said = judge(how, NONE_YET, steps(1, NAN, NAN))
    assert data is not None
    with pytest.raises(BadStepsError, match=r"every step from 2 to 3 was bad: 2 not finite .* bad_steps.then=rollback"):
        refuse_to_go_back(how, said.after, data)
    again = config(in_a_row=2, then="rollback", rollbacks=1)
    refuse_to_go_back(again, said.after, data)
    once = said.after.model_copy(update={"passed_over": [data]})
    with pytest.raises(BadStepsError, match=r"gone back 1 times already \(bad_steps.rollbacks=1\)"):
        refuse_to_go_back(again, once, data)


def test_all_ranges_are_passed_over_in_whatever_order_they_were_found() -> None:
    ranges = [(48, 64), (16, 32), (32, 40), (90, 99)]
    over = [BadData(first_step=0, last_step=0, begin=begin, end=end) for begin, end in ranges]
    want = {0: 0, 15: 15, 16: 40, 24: 40, 32: 40, 40: 40, 47: 47, 48: 64, 63: 64, 64: 64, 98: 99, 99: 99}
    assert {position: past(over, position) for position in want} == want
