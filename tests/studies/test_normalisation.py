"""The study of the normalisation, tiny: its numbers against closed forms, and the program with its picture."""

import math
from pathlib import Path

import pytest
import torch

from tests.studies.normalisation import CHOICES, main, of_router, sharpness


def test_uniform_and_one_hot_weights_are_the_two_ends() -> None:
    assert sharpness(torch.full((3, 16), 1 / 16)) == pytest.approx((1.0, 1 / 16))
    assert sharpness(torch.eye(16)) == pytest.approx((0.0, 1.0))


def test_the_start_has_the_sharpness_that_the_deviation_of_its_logits_gives() -> None:
    # The entropy of a softmax of n normal numbers of a small deviation s is log n - s^2 / 2.
    for choice, deviation in (("normalised", 96**-0.5), ("not normalised", 128**-0.5)):
        (missing,) = [1 - of_router(96, 256, choice, False, seed=0).dispatch.entropy]
        assert missing == pytest.approx(deviation**2 / 2 / math.log(256), rel=0.05)


def test_a_scale_of_one_changes_nothing_at_the_start() -> None:
    for with_scale, without in zip(list(CHOICES)[::2], list(CHOICES)[1::2], strict=True):
        assert of_router(96, 64, with_scale, False, 0) == of_router(96, 64, without, False, 0)


def test_the_program_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    picture, table = tmp_path / "n.png", tmp_path / "n.md"
    assert main(["widths=16,32", "tokens=8", "steps=2", f"picture={picture}", f"table={table}"]) == 0
    assert picture.stat().st_size > 10_000
    lines = table.read_text().splitlines()
    assert [len([line for line in lines if line.startswith(f"| {width} |")]) for width in (16, 32)] == [3, 3]
    assert lines[-1].count("|") == len(CHOICES) + 2


def test_a_word_that_is_no_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["out=x.json", "tokens=64", "widths"])
    assert exit_code.value.code == 2
    assert "out=x.json widths: there is no such option" in capsys.readouterr().err
