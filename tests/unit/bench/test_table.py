"""Numbers as a table shows them."""

from types import SimpleNamespace

import pytest

from softmoe_train.bench import table
from softmoe_train.bench.rounds import Spread
from softmoe_train.bench.table import milliseconds


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.2344, "1,234"), (0.1234, "123.4"), (0.0123, "12.30"), (0.001234, "1.234"), (0.0, "0.000")]
)
def test_digits_follow_the_size_of_the_median_whatever_its_sign(seconds: float, shown: str) -> None:
    assert milliseconds(Spread(seconds, seconds, seconds)) == f"{shown} ({shown} - {shown})"
    if seconds:
        assert milliseconds(Spread(-seconds, -seconds, -seconds)) == f"-{shown} (-{shown} - -{shown})"


def test_a_log_file_gets_a_line_in_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 11.0, 11.0, 15.0, 22.0, 22.0])
    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with table.progress(4, shown=True) as advance:
        for i in range(4):
            advance(f"case {i}")
    assert capsys.readouterr().err == "round 2 of 4: case 1\nround 4 of 4: case 3\n"
