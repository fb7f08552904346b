"""`softmoe train -m` for real: a sweep that is killed in the middle of a point and run again, and what it shows at its end."""

from pathlib import Path

import PIL.Image
import pytest

from softmoe_train.commands.main import main
from tests.runs import metrics, same_bits, stored
from tests.swept import SMALL, STEPS, Swept, killed_and_run_again, log, problems_of
from tests.under_way import train

WORDS = [*SMALL, "model.moe.num_experts=2,4", "sweep.fixed_slots=true"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two points of 8 slots each, the second of which was cut off."""
    return killed_and_run_again(tmp_path_factory.mktemp("sweeps") / "mine", WORDS, 1, forked=True)


def test_a_killed_sweep_goes_on_and_repeats_nothing(swept: Swept) -> None:
    assert swept.before == ["num_experts=2"] and swept.cut == "num_experts=4"
    assert problems_of(swept, 2) == []


def test_the_point_that_was_cut_off_has_the_bits_of_an_uninterrupted_run(swept: Swept, tmp_path: Path) -> None:
    assert f"resumed from {swept.folder}/num_experts=4/checkpoints/step_{swept.at:08d}" in log(swept.folder / swept.cut)
    words = ["model.moe.num_experts=4", "model.moe.slots_per_expert=2"]
    train(*SMALL, *words, "run_dir=whole", folder=tmp_path)  # with as many threads as the sweep's
    assert same_bits(stored(swept.folder / swept.cut, STEPS), stored(tmp_path / "whole", STEPS))


def test_at_the_end_there_are_a_table_a_heat_map_and_a_report(swept: Swept) -> None:
    """The cost comes first, of what is left and of all."""
    said = swept.done.stdout
    cost, table = said.index("2 points, 1 of them complete"), said.index("upstream/test/top1")
    assert cost < said.index("num_experts=4: started (attempt 2), goes on from about step") < table
    assert said.count("num_experts=2: ") == 0  # it is complete
    values = [metrics(swept.folder / f"num_experts={n}", "upstream/test/top1")[STEPS] for n in (2, 4)]
    assert all(f"{100 * value:.2f}" in said[table:] for value in values)
    with PIL.Image.open(swept.folder / "heat_map.png") as picture:
        assert picture.size[0] > 300
    assert "num_experts" in (swept.folder / "report.html").read_text()


def test_a_complete_sweep_shows_what_it_came_to_and_a_changed_one_is_refused(
    swept: Swept, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another value of a swept key leaves the finished points as they are."""
    words, here = ["train", "-m", *WORDS, f"run_dir={swept.folder}"], swept.folder
    monkeypatch.chdir(swept.folder.parent)
    lines = (here / "ledger.jsonl").read_text()
    assert main([*words, "sweep.cost=false"]) == 0
    assert "complete" in capsys.readouterr().out and (here / "ledger.jsonl").read_text() == lines
    assert main([*words, "schedule.peak=0.5"]) == 2
    told = capsys.readouterr().err
    assert "num_experts=2" in told and "schedule.peak=0.5 (was" in told and "allow_changes" in told
    more = [word.replace("num_experts=2,4", "num_experts=2,4,8") for word in words]
    assert main([*more, "sweep.only_cost=true"]) == 0
    assert "3 points, 2 of them complete" in capsys.readouterr().out
    assert not (here / "num_experts=8").exists() and (here / "ledger.jsonl").read_text() == lines


def test_a_sweep_is_not_for_a_worker_of_a_launcher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for verb in ("train", "finetune"):
        assert main([verb, "-m", "recipe=debug", "seed=1,2"]) == 2
        assert "write it without torchrun or srun" in capsys.readouterr().err
