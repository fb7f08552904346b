"""Numbers as a table shows them."""

import pytest

from softmoe_train.bench.rounds import Spread
from softmoe_train.bench.table import milliseconds


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.2344, "1,234"), (0.1234, "123.4"), (0.0123, "12.30"), (0.001234, "1.234"), (0.0, "0.000")]
)
def test_digits_follow_the_size_of_the_median_whatever_its_sign(seconds: float, shown: str) -> None:
    assert milliseconds(Spread(seconds, seconds, seconds)) == f"{shown} ({shown} - {shown})"
    if seconds:
        assert milliseconds(Spread(-seconds, -seconds, -seconds)) == f"-{shown} (-{shown} - -{shown})"
