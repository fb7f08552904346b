"""Schedules against the paper's values."""

import math

import pytest

from softmoe_train.optim.schedule import ScheduleConfig, learning_rate, schedule_problems


def rsqrt(peak: float, warmup: int, cooldown: int, timescale: int) -> ScheduleConfig:
    return ScheduleConfig(
        kind="rsqrt", peak=peak, warmup_steps=warmup, cooldown_steps=cooldown, timescale=timescale, final=0.0
    )


def test_rsqrt_matches_the_released_unit_test() -> None:
    config = rsqrt(0.1, 4, 3, 2)
    end = 0.1 / math.sqrt(3.5)
    want = [
        0,
        0.025,
        0.05,
        0.075,
        0.1,
        0.1 / math.sqrt(1.5),
        0.1 / math.sqrt(2),
        0.1 / math.sqrt(2.5),
        0.1 / math.sqrt(3),
    ]
    want += [end, end * 2 / 3, end / 3]
    assert [learning_rate(config, step, 12) for step in range(12)] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(5_000, 5e-4), (10_000, 1e-3), (20_000, 7.071e-4), (40_000, 5e-4), (110_000, 3.015e-4), (1_000_000, 1e-4)],
)
def test_rsqrt_passes_the_checkpoints_of_the_jft_run(step: int, rate: float) -> None:
    assert learning_rate(rsqrt(1e-3, 10_000, 50_000, 10_000), step, 4_000_000) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "cooldown", "rate"),
    [
        (300_000, 50_000, 2.0e-4),
        (1_000_000, 50_000, 1.026e-4),
        (2_000_000, 50_000, 7.161e-5),
        (4_000_000, 50_000, 5.032e-5),
        (4_000_000, 500_000, 5.345e-5),
        (9_000_000, 500_000, 3.430e-5),
        (10_000_000, 500_000, 3.244e-5),
    ],
)
def test_rsqrt_starts_its_cool_down_where_the_paper_s_runs_do(steps: int, cooldown: int, rate: float) -> None:
    config = rsqrt(1e-3, 10_000, cooldown, 10_000)
    assert learning_rate(config, steps - cooldown, steps) == pytest.approx(rate, rel=5e-4)
    assert learning_rate(config, steps - cooldown // 2, steps) == pytest.approx(rate / 2, rel=5e-4)


@pytest.mark.parametrize(("kind", "half"), [("cosine", 0.55), ("linear", 0.55)])
def test_cosine_and_linear_fall_from_peak_to_final(kind: str, half: float) -> None:
    config = ScheduleConfig.model_validate(
        {"kind": kind, "peak": 1.0, "warmup_steps": 10, "cooldown_steps": 0, "timescale": None, "final": 0.1}
    )
    assert [learning_rate(config, step, 110) for step in (5, 10, 60, 110)] == pytest.approx([0.5, 1.0, half, 0.1])
    quarter = learning_rate(config, 35, 110)
    assert quarter == pytest.approx(0.1 + 0.9 * (0.5 * (1 + math.sqrt(0.5)) if kind == "cosine" else 0.75))


def test_constant_holds_the_peak_until_the_cool_down() -> None:
    config = ScheduleConfig(kind="constant", peak=2.0, warmup_steps=2, cooldown_steps=4, timescale=None, final=0.0)
    assert [learning_rate(config, step, 10) for step in range(10)] == [0, 1, 2, 2, 2, 2, 2, 1.5, 1, 0.5]


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    (problem,) = schedule_problems(rsqrt(1e-3, 10, 50, 10), steps=59)
    assert "schedule.warmup_steps=10 plus schedule.cooldown_steps=50 exceed steps=59" in problem
    assert schedule_problems(rsqrt(1e-3, 10, 50, 10), steps=60) == []


def test_settings_that_a_kind_would_ignore_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"schedule\.timescale=5.*schedule\.cooldown_steps=3"):
        ScheduleConfig(kind="cosine", peak=1.0, warmup_steps=0, cooldown_steps=3, timescale=5, final=0.0)
