"""A report's line says what a person wants to see of it, and no more."""

from softmoe_train.observe.console import format_report


def test_the_line_says_what_part_of_the_time_waited_for_data() -> None:
    rates = {"train/loss": 1.5, "perf/images_per_second": 1234.4}
    assert format_report(20, 660, {**rates, "perf/data_share": 0.124}, 12.0) == (
        "step  20/660  loss 1.5000   1,234 images/s  data 12 %  eta 0:00:12"
    )
    assert "data" not in format_report(20, 660, {**rates, "perf/data_share": 0.009}, 12.0)


def test_an_evaluation_of_many_sets_is_one_calm_line() -> None:
    sets = {f"fewshot/set{i}/{shots}shot": i / 10 for i in range(9) for shots in (1, 5, 10, 25)}
    line = format_report(20, 660, sets | {"fewshot/set0/10shot_l2": 4.0}, None)
    assert line.startswith("step  20/660  fewshot/set0/10shot 0.0000  fewshot/set1/10shot 0.1000")
    assert line.count("10shot ") == 6 and line.endswith("fewshot/set5/10shot 0.5000  and 31 more")
    assert (
        format_report(9, 9, {"fewshot_average/pets/5shot": 0.5}, None) == "step 9/9  fewshot_average/pets/5shot 0.5000"
    )
    many = {"train/loss": 1.5, "train/grad_norm": 2.0, "router/1/entropy": 0.5, "upstream/test/top1": 0.5}
    assert "router" not in format_report(9, 9, many, None) and "more" not in format_report(9, 9, many, None)
