"""What people are told of a hang: which rank the others wait for, and where all are."""

import sys
import threading
import time
from types import FrameType

import pytest

from softmoe_train.checkpoint.agreement import agree
from softmoe_train.checkpoint.background import Background
from softmoe_train.faults.hang import busy_frame
from softmoe_train.faults.whereabouts import Report, duration, report_of, suspects, told

REDUCE = "all_reduce called by sum_over_world (softmoe_train/dist.py:131)"
READ = "select called by load_batches (softmoe_train/data/workers.py:42)"


def waiting(*ranks: int, step: int = 12) -> list[Report]:
    return [Report(rank, step, waits=True, place=REDUCE, seconds=1200) for rank in ranks]


def reading(*ranks: int) -> list[Report]:
    return [Report(rank, 12, waits=False, place=READ, seconds=1200) for rank in ranks]


@pytest.mark.parametrize(
    ("reports", "size", "suspected", "said"),
    [
        (
            waiting(0, 2, 3),
            4,
            [1],
            f"rank 1 (process 9 on node7) gave no sign of life; ranks 0, 2, 3 wait in {REDUCE} after step 12",
        ),
        (
            [*waiting(0, 2, 3, 4, 5), *reading(1)],
            6,
            [1],
            f"rank 1 (process 9 on node7) is in {READ} after step 12; ranks 0, 2-5 wait in {REDUCE} after step 12",
        ),
        (
            [*waiting(0, 3, step=13), *waiting(1, 2)],
            4,
            [1, 2],
            f"ranks 1, 2 wait in {REDUCE} after step 12; ranks 0, 3 wait in {REDUCE} after step 13",
        ),
        (waiting(0, 1), 2, [], f"ranks 0, 1 wait in {REDUCE} after step 12"),
        (reading(0), 1, [0], f"rank 0 is in {READ} after step 12"),
    ],
    ids=["silent", "busy", "late", "alike", "alone"],
)
def test_the_rank_that_the_others_wait_for_is_named_first(
    reports: list[Report], size: int, suspected: list[int], said: str
) -> None:
    assert suspects(reports, size) == suspected
    assert told(reports, size, {1: "process 9 on node7"}) == said


def test_of_many_places_the_line_names_a_few() -> None:
    reports = [Report(rank, rank, waits=True, place=REDUCE, seconds=1) for rank in range(100)]
    assert told(reports, 100, {}).endswith("; others are in 94 more places")


def test_a_place_is_where_our_code_is_and_what_it_called() -> None:
    def stage() -> FrameType:
        return sys._getframe()

    report = report_of(3, 12, agree("here", stage, 0, None), 5.0)
    assert report.place.startswith("stage called by agree (softmoe_train/checkpoint/agreement.py:")
    assert not report.waits
    assert Report.from_line(report.to_line()) == report


def test_minutes_are_told_as_minutes() -> None:
    assert [duration(6.4), duration(119), duration(1204)] == ["6 seconds", "119 seconds", "20 minutes"]


def test_a_main_thread_that_waits_for_a_save_is_where_the_save_is() -> None:
    background: Background[bool] = Background("checkpoint")
    go_on = threading.Event()
    background.start(lambda: go_on.wait(30))
    main = threading.Thread(target=background.wait)
    main.start()
    try:
        until = time.monotonic() + 10
        names: list[str] = []
        while "_run" not in names and time.monotonic() < until:
            frame, names = busy_frame(main.ident or 0), []
            while frame is not None:
                names, frame = [*names, frame.f_code.co_name], frame.f_back
        assert "_run" in names, names  # of the save's thread
    finally:
        go_on.set()
        main.join()
