"""`softmoe inspect`: what a checkpoint holds, whether it is whole, and how it differs from another, however each was cut."""

import json
from pathlib import Path

import pytest
import torch

from softmoe_train.checkpoint import blocks, shards, verify
from softmoe_train.checkpoint.blocks import opened
from softmoe_train.checkpoint.inspect import held_by_files, read_contents, totals
from softmoe_train.commands.main import main
from tests.unit.checkpoint.cut import CONFIG, LOOP, save_cut, values

W1 = "model.blocks.1.moe.experts.w1"
DOCUMENTS = {"config": CONFIG, "loop": LOOP}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints of two files each."""
    for step in (10, 20):
        save_cut(tmp_path / "run/checkpoints", step, values(), DOCUMENTS, files=2)
    return tmp_path / "run"


def inspected(run: Path, *overrides: str) -> dict:
    """What programs get of the newest checkpoint of a run."""
    assert main(["inspect", f"ckpt={run}", f"out={run.parent}/out.json", *overrides]) == 0
    return json.loads((run.parent / "out.json").read_text())


@pytest.mark.parametrize("buffer", [16, 100, 2**24])
def test_blocks_are_the_values_in_order_whatever_the_cut(
    tmp_path: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BUFFER", buffer)
    monkeypatch.setattr(blocks, "BUFFER", buffer)
    monkeypatch.setattr(blocks, "MOST_OPEN", 1)
    for files in (1, 2, 4):
        path = save_cut(tmp_path / str(files), 1, values(), {}, files)
        assert verify(path) == []
        stored = read_contents(path).manifest.tensors
        with opened(path) as there:
            for name, tensor in values().items():
                found = list(blocks.blocks(there, stored[name], tensor.dtype))
                together = torch.cat([block.reshape(-1) for block in found]) if found else torch.zeros(0)
                assert torch.equal(together, tensor.reshape(-1).to(together.dtype)), (files, name)
            some = list(blocks.blocks(there, stored[W1], torch.float64, (3, 5)))
        assert torch.equal(torch.cat(some), values()[W1][3:5].double())


def test_sizes_are_told_by_kind_and_experts_by_file(run: Path) -> None:
    contents = read_contents(run / "checkpoints/step_00000020")
    sums = totals(contents.manifest)
    assert list(sums) == ["model", "optimizer", "average", "loop"]
    assert sums["model"] == (3, 240 + 28 + 5, 960, 33 * 4)
    assert sums["average"] == (1, 28, 0, 112)
    files = held_by_files(contents.manifest)
    assert [held.experts for held in files.values()] == [[(0, 4)], [(4, 8)]]
    assert [held.bytes for held in files.values()] == [
        (contents.path / file).stat().st_size for file in files
    ]  # fmt: skip


def test_a_run_folder_means_its_newest_checkpoint(run: Path) -> None:
    document = inspected(run)
    assert (document["step"], document["saved_by"]) == (20, 2)
    assert (document["config"], document["loop"]) == (CONFIG, LOOP)
    assert document["tensors"][W1] == {
        "shape": [8, 6, 5], "dtype": "float32", "bytes": 960,
        "files": ["rank_00000.safetensors", "rank_00001.safetensors"],
        "experts": {"rank_00000.safetensors": [0, 4], "rank_00001.safetensors": [4, 8]},
    }  # fmt: skip
    assert (document["faults"], document["difference"]) == (None, None)
    assert inspected(run / "checkpoints/step_00000010")["step"] == 10


def test_a_person_sees_tree_sizes_files_position_and_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"ckpt={run}", "verify=true"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        f"{run}/checkpoints/step_00000020", "images seen 320", "data position position 320", "saved by 2 ranks",
        "model 3 273 960 B 132 B 1.1 KiB", "model 3 tensors 1.1 KiB", "blocks.1.moe.experts.w1 8 x 6 x 5 float32 960 B",
        "seen 1 int64 8 B", "width: 32",
        "verified: 12 chunks in 2 files cover every tensor, and every hash holds",
    ):  # fmt: skip
        assert line in lines, line
    assert any(line.startswith("rank_00001.safetensors") and line.endswith("4..7") for line in lines)


def test_verify_names_each_fault_and_ends_with_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step_00000020"
    file = path / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (path / "config.json").write_text("{}")
    assert main(["inspect", f"ckpt={run}"]) == 1
    assert "config.json is not what COMPLETE.json says" in capsys.readouterr().err
    assert main(["inspect", f"ckpt={run}", "verify=true"]) == 1
    said = capsys.readouterr().err
    assert "config.json is not what COMPLETE.json says" in said
    assert "rank_00001.safetensors: the bytes of" in said
    assert main(["inspect", f"ckpt={path.parent}/step_00000010", f"against={run}", "verify=true"]) == 1
    assert str(file.name) in capsys.readouterr().err


def test_verify_names_what_the_files_do_not_cover(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step_00000020/rank_00001.safetensors").unlink()
    assert main(["inspect", f"ckpt={run}", "verify=true"]) == 1
    assert f"rank_00001.safetensors is missing; it holds experts 4..7 of {W1}" in capsys.readouterr().err


def test_the_cut_makes_no_difference(run: Path) -> None:
    other = save_cut(run.parent / "other", 20, values(), DOCUMENTS, files=4)
    found = inspected(run, f"against={other}")["difference"]
    assert sorted(found["equal"]) == sorted(values())
    assert [found[key] for key in ("settings", "only_here", "only_there", "reshaped", "changed")] == [
        {},
        [],
        [],
        {},
        {},
    ]


def test_a_difference_tells_settings_names_shapes_and_values(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = values()
    there[W1][5, 2, 1] += 3.0
    there["model.new"] = there.pop("model.lone")
    there["average.odd"] = torch.zeros(7, 5)
    there["model.odd"][0, 0] = torch.nan
    other = save_cut(run.parent / "other", 30, there, {"config": {"seed": 4, "model": {"width": 32}}}, files=4)
    found = inspected(run, f"against={other}")["difference"]
    assert found["settings"] == {"seed": [3, 4]}
    assert (found["only_here"], found["only_there"]) == (["model.lone"], ["model.new"])
    assert found["reshaped"] == {"average.odd": ["float32 (7, 4)", "float32 (7, 5)"]}
    assert found["changed"]["model.odd"] == {"relative": None, "largest": None}
    assert found["changed"][W1]["largest"] == pytest.approx(3.0)
    assert found["changed"][W1]["relative"] == pytest.approx(3.0 / values()[W1].double().norm().item())
    said = capsys.readouterr().out
    for line in ("seed=3 here, 4 there", "model.lone is only here", "model.new is only there", "float32 (7, 5) there"):
        assert line in said


def test_all_mistakes_are_told_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step_00000020/COMPLETE.json").unlink()
    overrides = [
        "verfy=true",
        "verify=perhaps",
        f"ckpt={run}/checkpoints/step_00000020",
        "against=nowhere",
        "out=a.txt",
    ]
    assert main(["inspect", *overrides]) == 2
    said = capsys.readouterr().err
    assert "5 mistakes" in said
    for words in (
        "there is no key verfy; did you mean verify?",
        "verify='perhaps': input should be a valid boolean",
        "COMPLETE.json is missing: that save never finished, so it is no checkpoint; give another step's folder",
        "against=nowhere: there is no such folder; give a run folder or a step folder",
        "out=a.txt is not a .json file; end it in .json",
    ):
        assert words in said
    assert main(["inspect"]) == 2
    assert "ckpt is not set; give a run folder or a step folder, as in ckpt=runs/mine" in capsys.readouterr().err


def test_a_launcher_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", f"ckpt={run}"]) == 2
    assert "softmoe inspect is one process; start it without a launcher" in capsys.readouterr().err
