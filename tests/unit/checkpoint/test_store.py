"""One process saves, trusts and loads; what is damaged, missing or different is refused by name, before a write."""

import json
import os
import struct
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from softmoe_train.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore, DamagedError, shards, verify

W1 = "model.blocks.2.moe.experts.w1"
DOCUMENTS = {"config": {"seed": 3, "name": "é"}, "loop": {"step": 200, "best": [0.5, None]}}
ROOT = Path(__file__).resolve().parents[3]


def store_in(folder: Path, keep_last: int = 2, keep_every: int | None = None) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=keep_last, keep_every=keep_every, rank=0, world=1, group=None)


def truth() -> dict[str, Tensor]:
    return {
        W1: torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0)),
        "model.transposed": torch.arange(12.0).view(3, 4).t(),
        "model.head": torch.arange(1, 8).bfloat16() / 3,
        "optimizer.step": torch.tensor(7.0),
        "loop.seen": torch.tensor([2**40, -1]),
        "loop.flag": torch.tensor([True, False, True]),
        "loop.none": torch.zeros(0, 4),
    }


def blank(full: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in full.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return store_in(tmp_path).save(200, truth(), DOCUMENTS)


def refusal(path: Path, targets: dict[str, Tensor] | None = None) -> list[str]:
    """The problems that a load reports; fails if it wrote anything."""
    targets = blank(truth()) if targets is None else targets
    with pytest.raises(CheckpointError) as error:
        store_in(path.parent).load(path, targets)
    assert not any(tensor.any() for tensor in targets.values())
    return error.value.problems


def test_tensors_and_documents_come_back_equal(saved: Path) -> None:
    expected, targets, store = truth(), blank(truth()), store_in(saved.parent)
    store.load(saved, targets)
    assert saved.name == "step_00000200"
    assert [name for name in targets if not torch.equal(targets[name], expected[name])] == []
    assert store.read_documents(saved) == DOCUMENTS
    assert verify(saved) == []


def test_torch_reads_our_files_with_its_own_reader(tmp_path: Path) -> None:
    full = {name: tensor for name, tensor in truth().items() if name != "loop.none"}
    path, targets = store_in(tmp_path).save(1, full, {}), blank(full)
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert [name for name in targets if not torch.equal(targets[name], full[name])] == []


def test_a_folder_holds_safetensors_and_json_and_nothing_that_could_execute(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "COMPLETE.json", "config.json", "loop.json", "manifest.json", "rank_00000.safetensors",
    ]  # fmt: skip
    with safe_open(saved / "rank_00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(truth())
    for path in saved.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


def test_a_tensor_is_aligned_to_its_items(saved: Path) -> None:
    tensors = json.loads((saved / "manifest.json").read_text())["tensors"]
    widths = {name: tensor.dtype.itemsize for name, tensor in truth().items()}
    assert [name for name in tensors if tensors[name]["chunks"][0]["start"] % widths[name]] == []


def test_a_read_through_a_buffer_smaller_than_a_row_is_the_same(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BUFFER", 16)
    targets = blank(truth())
    store_in(saved.parent).load(saved, targets)
    assert torch.equal(targets[W1], truth()[W1])


def test_all_that_is_missing_or_different_is_reported_at_once(saved: Path) -> None:
    targets = blank(truth())
    del targets["model.transposed"]
    targets["model.new"] = torch.zeros(1)
    targets[W1] = torch.zeros(4, 5, 3)
    targets["optimizer.step"] = torch.zeros((), dtype=torch.float64)
    (saved / "rank_00000.safetensors").unlink()
    lines = refusal(saved, targets)
    assert len(lines) == 5
    for names, words in [
        ("model.new", "not in the checkpoint"),
        ("model.transposed", "nothing here takes it"),
        (W1, "float32 (8, 5, 3) in the checkpoint but float32 (4, 5, 3) here"),
        ("optimizer.step", "float32 () in the checkpoint but float64 () here"),
        ("rank_00000.safetensors", "is missing; it holds"),
    ]:
        assert any(line.startswith(names) and words in line for line in lines), (names, lines)


def test_what_does_not_fit_is_no_damage(saved: Path) -> None:
    store, targets = store_in(saved.parent), blank(truth())
    (saved / "rank_00000.safetensors").unlink()
    with pytest.raises(DamagedError):
        store.load(saved, targets)
    del targets["model.transposed"]
    with pytest.raises(CheckpointError) as error:
        store.load(saved, targets)
    assert not isinstance(error.value, DamagedError)


def test_a_checkpoint_of_another_version_is_no_damage(saved: Path) -> None:
    mark = json.loads((saved / "COMPLETE.json").read_text())
    (saved / "COMPLETE.json").write_text(json.dumps({**mark, "version": 3}))
    with pytest.raises(CheckpointError, match="version") as error:
        store_in(saved.parent).load(saved, blank(truth()))
    assert not isinstance(error.value, DamagedError)


def test_what_is_set_aside_keeps_its_bytes_and_does_not_exist_for_the_loader(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(saved.parent)
    for count in (1, 2):
        newer = store.save(300, truth(), {})
        before = {path.name: path.read_bytes() for path in newer.iterdir()}
        store.set_aside(newer, ["rank_00000.safetensors is missing"])
        assert store.latest() == saved
        place = store.folders_set_aside()[-1]
        assert place.name == "step_00000300.damaged" + ("" if count == 1 else "-2")
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before
        assert (
            f"{newer} is damaged:\n  - rank_00000.safetensors is missing\nit is set aside as {place.name}"
            in caplog.text
        )
    for step in (400, 500, 600):
        store.save(step, truth(), {})
    assert len(store.folders_set_aside()) == 2, "retention deletes none of them"


def test_a_load_says_what_it_read(saved: Path) -> None:
    read = store_in(saved.parent).load(saved, blank(truth()))
    assert str(read) == "3 model, 1 optimizer and 3 loop tensors (0.0 MiB in 1 file)"
    assert read.saved_by == 1
    assert read.bytes == sum(tensor.nbytes for tensor in truth().values())
    part = {"model.head": torch.zeros(7).bfloat16(), "optimizer.step": torch.tensor(0.0)}
    read = store_in(saved.parent).load(saved, part, prefix=("model.head", "optimizer."))
    assert str(read).startswith("1 model and 1 optimizer tensors")
    assert (read.tensors, read.bytes) == ({"model": 1, "optimizer": 1}, 14 + 4)


def test_a_target_without_storage_is_refused(saved: Path) -> None:
    targets = blank(truth())
    targets[W1] = targets[W1].to("meta")
    with pytest.raises(CheckpointError, match=f"{W1} is on the meta device"):
        store_in(saved.parent).load(saved, targets)


def test_a_prefix_loads_a_part_and_is_strict_within_it(saved: Path) -> None:
    part = {name: tensor for name, tensor in blank(truth()).items() if name.startswith("model.")}
    store_in(saved.parent).load(saved, part, prefix="model.")
    assert torch.equal(part[W1], truth()[W1])
    del part[W1]
    with pytest.raises(CheckpointError, match=f"{W1} is in the checkpoint"):
        store_in(saved.parent).load(saved, part, prefix="model.")


def test_a_missing_file_is_named_with_the_experts_it_holds(saved: Path) -> None:
    (saved / "rank_00000.safetensors").unlink()
    (line,) = refusal(saved)
    assert line.startswith("rank_00000.safetensors is missing; it holds ")
    assert f"experts 0..7 of {W1}" in line
    assert verify(saved) == [line]


def test_a_truncated_file_is_refused_by_name(saved: Path) -> None:
    size = os.path.getsize(saved / "rank_00000.safetensors")
    os.truncate(saved / "rank_00000.safetensors", size - 1)
    (line,) = refusal(saved)
    assert line.startswith(f"rank_00000.safetensors has {size - 1} bytes, not {size}")


@pytest.mark.parametrize("name", sorted(set(truth()) - {"loop.none"}))
def test_a_flipped_bit_is_refused_by_the_tensor_s_name(saved: Path, name: str) -> None:
    chunk = json.loads((saved / "manifest.json").read_text())["tensors"][name]["chunks"][0]
    data = bytearray((saved / chunk["file"]).read_bytes())
    data[chunk["start"]] ^= 1
    (saved / chunk["file"]).write_bytes(data)
    (line,) = refusal(saved)
    assert name in line
    assert "their hash differs" in line
    assert verify(saved) == [line]


def test_verify_finds_a_header_that_does_not_match_the_manifest(saved: Path) -> None:
    file = saved / "rank_00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype": "BF16"', b'"dtype": "F16" ', 1))
    assert verify(saved) == ["rank_00000.safetensors: its header and manifest.json differ in model.head"]
    file.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    assert "no safetensors file" in verify(saved)[0]


def test_verify_names_a_file_that_does_not_belong(saved: Path) -> None:
    (saved / ".metadata").write_bytes(b"\x80\x04.")
    assert verify(saved) == [".metadata does not belong here"]


@pytest.mark.parametrize("file", ["manifest.json", "config.json", "loop.json"])
@pytest.mark.parametrize("damage", ["deleted", "edited"])
def test_a_deleted_or_edited_json_is_refused_by_name(saved: Path, file: str, damage: str) -> None:
    if damage == "deleted":
        (saved / file).unlink()
    else:
        (saved / file).write_text((saved / file).read_text().replace("200", "201").replace("3", "4"))
    expected = [
        f"{file} is missing" if damage == "deleted" else f"{file} is not what COMPLETE.json says: it was changed"
    ]
    assert verify(saved) == expected
    if file == "manifest.json":
        assert refusal(saved) == expected
    else:
        with pytest.raises(CheckpointError) as error:
            store_in(saved.parent).read_documents(saved)
        assert error.value.problems == expected


def test_a_mark_that_is_not_ours_is_refused(saved: Path) -> None:
    (saved / "COMPLETE.json").write_text('{"version": 9}')
    assert any("version" in line for line in refusal(saved))


def test_a_folder_without_a_mark_does_not_exist(saved: Path) -> None:
    store = store_in(saved.parent)
    newer = store.save(300, truth(), {})
    (newer / "COMPLETE.json").unlink()
    assert store.latest() == saved
    assert refusal(newer) == ["COMPLETE.json is missing: the save never finished"]


def test_there_is_no_latest_where_nothing_was_saved(tmp_path: Path) -> None:
    assert store_in(tmp_path / "none").latest() is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(99_999_999, truth(), {})
    assert store.save(100_000_000, truth(), {}) == store.latest()


def test_only_the_newest_are_kept_and_leftovers_are_cleared(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=2)
    (tmp_path / "step_00000250").mkdir()
    (tmp_path / "notes").mkdir()
    for step in (100, 200, 300):
        store.save(step, truth(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000200", "step_00000300"]


def test_every_nth_step_and_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=1, keep_every=300)
    for step, best in ((100, None), (200, 200), (300, 200), (400, 200), (500, 200)):
        store.save(step, truth(), {}, best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000200", "step_00000300", "step_00000500"]
    assert store.holds(200)
    assert not store.holds(400)
    store.save(600, truth(), {}, best=600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000300", "step_00000600"]


def test_all_from_a_step_on_is_deleted_and_the_ones_before_stay(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=9)
    for step in (100, 200, 300):
        store.save(step, truth(), {})
    assert [path.name for path in store.delete_from(101)] == ["step_00000300", "step_00000200"]
    assert store.delete_from(101) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100"]
    store.save(200, truth(), {})


def test_the_newest_from_before_bad_steps_is_kept_as_the_way_back(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=2)
    store.save(100, truth(), {})
    for step in (121, 123, 125):  # interrupted within a streak of bad steps that began at 120
        store.save(step, truth(), {}, before=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_00000123", "step_00000125"]
    store.save(200, truth(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000125", "step_00000200"]


def test_a_retention_that_fails_leaves_a_save_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path, keep_last=1)

    def fails(*_: object) -> None:
        raise OSError("the disk does not answer")

    monkeypatch.setattr(store, "_superfluous", fails)
    monkeypatch.setattr(store, "_early", lambda *_: [])
    assert verify(store.save(1, truth(), {})) == []


def test_a_step_that_is_complete_is_left_as_it_is(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert store_in(saved.parent).save(200, blank(truth()), {}) == saved
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_step_older_than_the_latest_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="step_00000200 is newer than step_00000100"):
        store_in(saved.parent).save(100, truth(), {})


@pytest.mark.parametrize(
    ("tensors", "documents", "words"),
    [
        ({}, {}, "no tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, "w has dtype torch.complex64"),
        ({"w": torch.zeros(2, device="meta")}, {}, "w is on the meta device"),
        ({"__metadata__": torch.zeros(2)}, {}, "is no name for a tensor"),
        ({"w": torch.zeros(2)}, {"loop": {"loss": float("nan")}}, "document loop: Out of range"),
        ({"w": torch.zeros(2)}, {"../x": 1}, "document '../x'"),
        ({"w": torch.zeros(2)}, {"manifest": 1}, "document 'manifest'"),
        ({"w": torch.zeros(2)}, {"complete": 1}, "document 'complete'"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_a_folder_is_made(
    tmp_path: Path, tensors: dict, documents: dict, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        store_in(tmp_path).save(1, tensors, documents)
    assert list(tmp_path.iterdir()) == []


def test_the_yaml_is_a_legal_configuration() -> None:
    values = yaml.safe_load((ROOT / "conf/checkpoint/default.yaml").read_text())
    assert CheckpointConfig(**values).keep_last >= 1
    for key, value, words in [
        ("keep_last", 0, "keep_last"),
        ("keep_every", 2500, "checkpoint.keep_every=2500 is no multiple of checkpoint.every=1000.* use 3000"),
        ("best", "upstream/test/top1", "checkpoint.best='upstream/test/top1' says not which end is good"),
    ]:
        with pytest.raises(ValidationError, match=words):
            CheckpointConfig(**{**values, key: value})
    with pytest.raises(ValidationError, match="which saves only at the end"):
        CheckpointConfig(**{**values, "every": 0, "keep_every": 10})
