"""A report's line says what a person wants to see of it, and no more."""

from softmoe_train.observe.console import format_report


def test_the_line_says_what_part_of_the_time_waited_for_data() -> None:
    rates = {"train/loss": 1.5, "perf/images_per_second": 1234.4}
    assert format_report(20, 660, {**rates, "perf/data_share": 0.124}, 12.0) == (
        "step  20/660  loss 1.5000   1,234 images/s  data 12 %  eta 0:00:12"
    )
    assert "data" not in format_report(20, 660, {**rates, "perf/data_share": 0.009}, 12.0)
