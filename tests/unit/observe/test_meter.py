from collections.abc import Iterator

import numpy as np
import pytest
import torch

from softmoe_train.observe.meter import GIB, Meter, StallWatch, peak_memory_bytes


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    return Clock()


def test_rates_are_those_of_the_interval_since_the_last_read(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"), clock)
    clock.now += 7.0
    meter.step(1000)
    meter.read()
    for _ in range(4):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.step(64)
    read = meter.read()
    assert read["perf/images_per_second"] == 4 * 64 / 8.0
    assert read["perf/step_seconds"] == 2.0
    assert read["perf/data_seconds"] == 0.5
    assert read["perf/data_share"] == 0.25


def test_paused_time_is_in_no_rate(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"), clock)
    clock.now += 2.0
    meter.step(64)
    with meter.paused():
        clock.now += 1000.0
    assert meter.read()["perf/images_per_second"] == 32.0


def test_an_interval_without_a_step_has_no_rates(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"), clock)
    clock.now += 1.0
    assert set(meter.read()) == {"perf/peak_memory_gib"}


def test_peak_memory_on_the_cpu_is_resident_memory_and_never_falls() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = np.ones(200 * 2**20, dtype=np.uint8)
    during = peak_memory_bytes(torch.device("cpu"))
    del held
    assert during >= 200 * 2**20
    assert during >= before
    assert peak_memory_bytes(torch.device("cpu")) >= during
    assert during < 64 * GIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_what_torch_allocated() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(device)
    torch.empty(2**28, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) == before + 2**28


def told(*shares: float | None) -> list[bool]:
    watch = StallWatch()
    reports = [{} if share is None else {"perf/data_share": share, "perf/data_seconds": 0.5} for share in shares]
    return [watch.see(report) is not None for report in reports]


def test_three_reports_in_a_row_that_wait_for_data_are_told_once() -> None:
    assert told(0.9, 0.2, 0.2, 0.2, 0.2, 0.2) == [False, False, False, True, False, False]
    assert told(0.9, 0.2, 0.2, 0.1, 0.2, 0.2) == [False] * 6
    assert told(0.0, 0.2, 0.2, None, 0.2, 0.0, 0.3, 0.3, 0.3) == [
        False,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        True,
    ]


def test_a_stall_is_told_in_plain_words_with_the_remedy() -> None:
    watch = StallWatch()
    [text] = [t for _ in range(4) if (t := watch.see({"perf/data_share": 0.34, "perf/data_seconds": 0.12}))]
    assert text.startswith(
        "steps wait for data: 34 % of the time (120 ms a step), and in each of the last 3 reports more than 15 %; raise data.workers"
    )
