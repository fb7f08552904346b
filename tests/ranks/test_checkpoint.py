"""A checkpoint saved by real ranks at one layout loads bit-equal at another, and a failing rank fails them all."""

import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from softmoe_train.checkpoint import CheckpointError, CheckpointStore, DamagedError, verify
from softmoe_train.checkpoint.remote import place_of
from tests.ranks.launch import RankFailedError, run_ranks
from tests.unit.checkpoint import elsewhere

STORE = elsewhere.__name__  # the import registers it, in every rank
E, D, H = 8, 6, 5  # experts, width, hidden
EXPERTS = "model.blocks.1.moe.experts.w1"
Problems = tuple[list[str], bool]


def truth() -> dict[str, Tensor]:
    """What is saved, as whole tensors, every element its own value."""
    return {
        EXPERTS: torch.arange(E * D * H).view(E, D, H).float(),
        "optimizer.exp_avg.blocks.1.moe.experts.w1": torch.arange(E * D * H).view(E, D, H).float().neg(),
        "model.odd.moe.experts.w1": torch.arange(6 * D).view(6, D).double(),  # expert_dp cuts 3 experts into 2 and 1
        "model.few.moe.experts.w1": torch.arange(2 * D).view(2, D).half(),  # and leaves ranks without any of these
        "model.blocks.0.attn.qkv.weight": torch.arange(7 * D).view(7, D).float() / 3,  # uneven over 2 and 4
        "model.blocks.0.mlp.weight": torch.arange(D * 8).view(D, 8).float() / 7,
        "model.half": torch.arange(11).bfloat16() / 3,
        "model.router.scale": torch.tensor([1.5]),
        "loop.seen": torch.tensor(2**40 + 1),
        "loop.counts": torch.arange(3).int(),
        "loop.flags": torch.tensor([True, False, True]),
    }


def placed(full: dict[str, Tensor], world: int, axis: int) -> dict[str, Tensor]:
    """The same tensors as an engine at this layout holds them: experts on ep, then fully_shard over expert_dp."""
    if world == 1:
        return {name: tensor.clone() for name, tensor in full.items()}
    mesh = init_device_mesh("cpu", (world // axis, axis), mesh_dim_names=("expert_dp", "ep"))
    flat = init_device_mesh("cpu", (world,))
    out: dict[str, Tensor] = {}
    for name, tensor in full.items():
        if ".experts." in name:
            out[name] = _expert(tensor, mesh)
        elif name.endswith("qkv.weight"):
            out[name] = distribute_tensor(tensor.clone(), flat, [Shard(0)], src_data_rank=None)
        elif name.endswith("mlp.weight"):
            out[name] = distribute_tensor(tensor.clone(), mesh, [Replicate(), Shard(1)], src_data_rank=None)
        else:
            out[name] = tensor.clone()
    return out


def _expert(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    unit = nn.Module()
    on_ep = distribute_tensor(tensor.clone(), mesh["ep"], [Shard(0)], src_data_rank=None)
    unit.weight = nn.Parameter(on_ep)
    if mesh["expert_dp"].size() > 1:
        fully_shard(unit, mesh=mesh["expert_dp"])
    return unit.weight.data


def store_at(folder: str, rank: int, world: int, keep_last: int = 3) -> CheckpointStore:
    return CheckpointStore(
        place_of(folder), keep_last=keep_last, rank=rank, world=world, group=None if world == 1 else dist.group.WORLD
    )


def _save(rank: int, world: int, folder: str, axis: int) -> tuple[str, str]:
    tensors = placed(truth(), world, axis)
    path = store_at(folder, rank, world).save(200, tensors, {"config": {"seed": 1}, "loop": {"step": 200}})
    placements = tensors[EXPERTS].placements if isinstance(tensors[EXPERTS], DTensor) else ()
    return str(path), str(placements)


def _load(rank: int, world: int, folder: str, axis: int) -> tuple[list[str], set[str], dict]:
    """The names whose local part differs from the truth, the shard files opened, and the documents."""
    store = store_at(folder, rank, world)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in truth().items()}
    tensors, expected = placed(zeros, world, axis), placed(truth(), world, axis)
    path = store.latest()
    assert path is not None
    opened: set[str] = set()
    sys.addaudithook(lambda event, args: opened.add(Path(str(args[0])).name) if event == "open" else None)
    store.load(path, tensors)
    documents = store.read_documents(path)
    wrong = [name for name in tensors if not torch.equal(_local(tensors[name]), _local(expected[name]))]
    return wrong, {name for name in opened if name.endswith(".safetensors")}, documents


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A checkpoint of 4 ranks at expert axis 2, and what each rank returned."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(_save, 4, str(folder), 2)


def test_a_save_at_4_ranks_is_strided_and_has_no_fault(saved: tuple[Path, list[tuple[str, str]]]) -> None:
    folder, returned = saved
    assert [path for path, _ in returned] == [str(folder / "step_00000200")] * 4
    assert "StridedShard" in returned[0][1]
    assert verify(folder / "step_00000200") == []


def test_nothing_is_stored_for_ranks_that_a_cut_left_empty(saved: tuple[Path, list[tuple[str, str]]]) -> None:
    tensors = json.loads((saved[0] / "step_00000200" / "manifest.json").read_text())["tensors"]
    assert [chunk["experts"] for chunk in tensors["model.few.moe.experts.w1"]["chunks"]] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(("world", "axis"), [(2, 1), (2, 2), (4, 4)])
def test_it_loads_bit_equal_at_another_layout(saved: tuple[Path, list[tuple[str, str]]], world: int, axis: int) -> None:
    for wrong, _, documents in run_ranks(_load, world, str(saved[0]), axis):
        assert wrong == []
        assert documents == {"config": {"seed": 1}, "loop": {"step": 200}}


def test_ranks_save_into_an_object_store_and_load_from_it_at_another_layout(tmp_path: Path) -> None:
    url = f"elsewhere://{tmp_path}/run"
    assert [path for path, _ in run_ranks(_save, 2, url, 2)] == [f"{url}/step_00000200"] * 2
    assert verify(place_of(f"{url}/step_00000200")) == []
    assert [wrong for wrong, _, _ in run_ranks(_load, 2, url, 1)] == [[], []]


def test_it_loads_bit_equal_in_one_process(saved: tuple[Path, list[tuple[str, str]]]) -> None:
    wrong, _, _ = _load(0, 1, str(saved[0]), 1)
    assert wrong == []


def _refusals(rank: int, world: int, folders: dict[str, str]) -> dict[str, Problems]:
    """For each damaged folder: the problems that the load reports, and whether every target stayed untouched."""
    found = {}
    for damage, folder in folders.items():
        store = store_at(folder, rank, world)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in truth().items()}
        tensors = placed(zeros, world, axis=1)
        with pytest.raises(DamagedError) as error:
            store.load(Path(folder) / "step_00000200", tensors)
        untouched = all(not _local(tensor).any() for tensor in tensors.values())
        found[damage] = (error.value.problems, untouched)
    return found


def _first_byte(path: Path, name: str, file: str) -> int:
    chunks = json.loads((path / "manifest.json").read_text())["tensors"][name]["chunks"]
    return next(chunk["start"] for chunk in chunks if chunk["file"] == file)


def test_damage_that_one_rank_meets_is_reported_by_all_before_anything_is_written(
    saved: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    source = saved[0] / "step_00000200"
    folders = {}
    for damage in ("missing", "truncated", "flipped"):
        folder = tmp_path / damage
        shutil.copytree(source, folder / source.name)
        file = folder / source.name / "rank_00003.safetensors"  # experts 6 and 7, which only rank 1 of 2 needs
        data = bytearray(file.read_bytes())
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(data[:-1])
        else:
            data[_first_byte(source, EXPERTS, file.name)] ^= 1
            file.write_bytes(data)
        folders[damage] = str(folder)
    ranks = run_ranks(_refusals, 2, folders)
    assert ranks[0] == ranks[1]
    assert all(untouched for _, untouched in ranks[0].values())
    for damage, words in {"missing": "is missing", "truncated": "bytes, not", "flipped": "hash differs"}.items():
        (line,) = ranks[0][damage][0]
        assert "rank_00003.safetensors" in line
        assert words in line
        assert f"experts 6..7 of {EXPERTS}" in line


def _opened_by_a_matching_load(rank: int, world: int, folder: str) -> set[str]:
    full = {EXPERTS: truth()[EXPERTS]}
    store = store_at(folder, rank, world)
    store.save(1, placed(full, world, axis=2), {})
    path = store.latest()
    assert path is not None
    tensors = placed(full, world, axis=2)
    opened: set[str] = set()
    sys.addaudithook(lambda event, args: opened.add(Path(str(args[0])).name) if event == "open" else None)
    store.load(path, tensors)
    return {name for name in opened if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[set[str]]]:
    """A checkpoint of 2 ranks with half the experts each, and the files that each opened to load it again."""
    folder = tmp_path_factory.mktemp("halves")
    return folder / "step_00000001", run_ranks(_opened_by_a_matching_load, 2, str(folder))


def test_a_rank_opens_only_the_files_that_it_needs(halves: tuple[Path, list[set[str]]]) -> None:
    assert halves[1] == [{"rank_00000.safetensors"}, {"rank_00001.safetensors"}]


def test_files_of_two_ranks_that_were_swapped_are_refused_by_name(
    halves: tuple[Path, list[set[str]]], tmp_path: Path
) -> None:
    path = shutil.copytree(halves[0], tmp_path / halves[0].name)
    first, second = (path / f"rank_0000{rank}.safetensors" for rank in (0, 1))
    assert first.stat().st_size == second.stat().st_size  # so that only the hash can tell
    first.rename(path / "aside")
    second.rename(first)
    (path / "aside").rename(second)
    target = torch.zeros(E, D, H)
    with pytest.raises(CheckpointError) as error:
        store_at(str(tmp_path), 0, 1).load(path, {EXPERTS: target})
    assert list(dict.fromkeys(line.split(":")[0] for line in error.value.problems)) == [first.name, second.name]
    assert not target.any()
    assert len([line for line in verify(path) if "hash differs" in line]) == 2


def _save_where_rank_1_has_no_room(rank: int, world: int, folder: str) -> tuple[list[str], str | None]:
    store = store_at(folder, rank, world)
    first = store.save(1, placed(truth(), world, axis=2), {})
    big = distribute_tensor(torch.ones(1000, 1000), init_device_mesh("cpu", (world,)), [Shard(0)], src_data_rank=None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # bytes: a real write error
    with pytest.raises(CheckpointError) as error:
        store.save(2, {"model.big": big}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.latest() == first
    third = store.save(3, {"model.big": big}, {})
    return error.value.problems, str(third)


def test_a_write_error_on_one_rank_is_raised_on_all_and_the_next_save_clears_it_away(tmp_path: Path) -> None:
    for problems, third in run_ranks(_save_where_rank_1_has_no_room, 2, str(tmp_path)):
        assert len(problems) == 1
        assert problems[0].startswith("rank 1: OSError")
        assert verify(Path(third)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def _save_while_rank_1_is_killed(rank: int, world: int, folder: str) -> None:
    store = store_at(folder, rank, world)
    store.save(1, placed(truth(), world, axis=2), {})

    big = distribute_tensor(torch.ones(1000, 1000), init_device_mesh("cpu", (world,)), [Shard(0)], src_data_rank=None)
    if rank == 1:
        # The kernel kills us in the middle of a write, at this byte of the file.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    store.save(2, {"model.big": big}, {})


def test_a_rank_killed_while_it_writes_leaves_the_previous_checkpoint_the_latest(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2:\nkilled by SIGXFSZ"):
        run_ranks(_save_while_rank_1_is_killed, 2, str(tmp_path))
    latest = store_at(str(tmp_path), 0, 1).latest()
    assert latest == tmp_path / "step_00000001"
    assert verify(latest) == []
    assert (tmp_path / "step_00000002" / "rank_00001.safetensors").stat().st_size == 1_000_000


def _odd_layouts(rank: int, world: int, folder: str) -> dict[str, list[str]]:
    """The problems of two layouts that are no box, and the folder of a save where rank 1 is outside a tensor's mesh."""
    mesh, store = init_device_mesh("cpu", (world,)), store_at(folder, rank, world)
    scattered = DTensor.from_local(torch.ones(4), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    short = DTensor.from_local(torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([8]), stride=(1,))
    found = {}
    for name, tensor in {"scattered": scattered, "short": short}.items():
        with pytest.raises(CheckpointError) as error:
            store.save(1, {f"model.{name}": tensor}, {})
        found[name] = error.value.problems
    lone = distribute_tensor(torch.arange(6.0), DeviceMesh("cpu", [0]), [Shard(0)], src_data_rank=None)
    path = store.save(2, {"model.lone": lone, "model.shared": torch.ones(2)}, {})
    return {**found, "path": [str(path)]}


@pytest.fixture(scope="module")
def odd_layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What both ranks report of them."""
    first, second = run_ranks(_odd_layouts, 2, str(tmp_path_factory.mktemp("odd")))
    assert first == second
    return first


@pytest.mark.parametrize("name", ["scattered", "short"])
def test_a_layout_whose_local_part_is_not_the_box_it_should_be_is_refused(
    odd_layouts: dict[str, list[str]], name: str
) -> None:
    assert len(odd_layouts[name]) == 2  # each rank's own
    assert all(line.startswith(f"model.{name} as (") for line in odd_layouts[name])
    assert [path.name for path in Path(odd_layouts["path"][0]).parent.iterdir()] == ["step_00000002"]


def test_a_tensor_that_only_some_ranks_hold_is_saved_whole(odd_layouts: dict[str, list[str]]) -> None:
    path = Path(odd_layouts["path"][0])
    tensors = {"model.lone": torch.zeros(6), "model.shared": torch.zeros(2)}
    store_at(str(path.parent), 0, 1).load(path, tensors)
    assert torch.equal(tensors["model.lone"], torch.arange(6.0))


def _memory_of_saves(rank: int, world: int, folder: str) -> tuple[int, list[int]]:
    """Bytes that this rank stages, and the growth of its peak of resident memory after each of three saves."""
    mesh = init_device_mesh("cpu", (world,))
    own = [torch.ones(2**10, 2**13) for _ in range(2)]  # 32 MiB each
    tensors = {f"model.w{i}": DTensor.from_local(part, mesh, [Shard(0)], run_check=False) for i, part in enumerate(own)}
    store = store_at(folder, rank, world, keep_last=1)
    before, grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for step in range(3):
        store.save(step, tensors, {})
        grown.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    return store.staged_bytes, grown


def test_saves_take_the_memory_that_is_staged_and_take_it_once(tmp_path: Path) -> None:
    for staged, (first, _, third) in run_ranks(_memory_of_saves, 2, str(tmp_path)):
        assert staged == 64 * 2**20
        assert staged < first < 2 * staged  # with what a first save imports
        assert third - first < staged // 8
