"""Whatever happens to any file of a checkpoint is found and named: nothing loads, no target is touched, `inspect` ends with 1."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError, CheckpointStore, DamagedError, verify
from softmoe_train.commands.main import main
from tests.unit.checkpoint.cut import CONFIG, LOOP, save_cut, values

RANKS = 3
FILES = [
    *(f"rank_{rank:05d}.safetensors" for rank in range(RANKS)),
    "manifest.json", "config.json", "loop.json", "stream.json", "COMPLETE.json",
]  # fmt: skip


def saved(folder: Path, step: int) -> Path:
    """A checkpoint of three ranks, of which no file is as in that of another step."""
    tensors = {name: tensor + step for name, tensor in values().items()}
    documents = {
        "config": {**CONFIG, "seed": step},
        "loop": {**LOOP, "step": step},
        "stream": {"kind": "webdataset", "seed": step},
    }
    return save_cut(folder, step, tensors, documents, files=RANKS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newer one of two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    saved(folder, 10)
    return saved(folder, 20)


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, beside a copy of the older one."""
    return shutil.copytree(whole.parent, tmp_path / "run/checkpoints") / whole.name


def read_all(path: Path, targets: dict[str, Tensor]) -> None:
    """Read the documents and fill `targets`, as a run does that resumes."""
    store = CheckpointStore(path.parent, keep_last=9, rank=0, world=1, group=None)
    store.read_documents(path)
    store.load(path, targets)


def refusal(path: Path) -> CheckpointError:
    """What a load raises; fails if it touched anything."""
    targets = {name: torch.full_like(tensor, 77) for name, tensor in values().items()}
    with pytest.raises(CheckpointError) as error:
        read_all(path, targets)
    assert all(bool((tensor == 77).all()) for tensor in targets.values())
    return error.value


def truncated(file: Path, bytes_left: Callable[[int], int]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: bytes_left(len(data))])


def flipped(file: Path, at: Callable[[int], int]) -> None:
    data = bytearray(file.read_bytes())
    data[at(len(data))] ^= 1 << random.Random(file.name).randrange(8)
    file.write_bytes(data)


def swapped(file: Path, other: Path) -> None:
    one, two = file.read_bytes(), other.read_bytes()
    assert one != two
    file.write_bytes(two)
    other.write_bytes(one)


def next_of_its_kind(file: Path) -> Path:
    """Another rank's file, or another JSON."""
    kind = [name for name in FILES if name.endswith(file.suffix)]
    return file.with_name(kind[(kind.index(file.name) + 1) % len(kind)])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: truncated(file, lambda size: 0),
    "cut in half": lambda file: truncated(file, lambda size: size // 2),
    "without its last byte": lambda file: truncated(file, lambda size: size - 1),
    "a bit of its first byte": lambda file: flipped(file, lambda size: 0),
    "a bit of its 20th byte": lambda file: flipped(file, lambda size: 20),
    "a bit in the middle": lambda file: flipped(file, lambda size: size // 2),
    "a bit of its last byte": lambda file: flipped(file, lambda size: size - 1),
    "another rank's": lambda file: swapped(file, next_of_its_kind(file)),
    "another step's": lambda file: swapped(file, file.parent.with_name("step_00000010") / file.name),
}


def test_the_undamaged_one_loads(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = {name: torch.zeros_like(tensor) for name, tensor in values().items()}
    read_all(path, targets)
    assert all(torch.equal(targets[name], tensor + 20) for name, tensor in values().items())
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert main(["inspect", f"ckpt={path}", "verify=true"]) == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_to_each_file_is_found_and_named_and_none_loads(
    path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](path / name)
    error = refusal(path)
    # Two JSON files that were swapped are both damaged; the one that is read first is named.
    names = [name, next_of_its_kind(path / name).name] if (damage, name[-4:]) == ("another rank's", "json") else [name]
    assert any(name in str(error) for name in names)
    code = main(["inspect", f"ckpt={path}", "verify=true"])
    said = capsys.readouterr().err
    assert any(name in said for name in names)
    # Without its mark a folder is no checkpoint: a wrong setting.
    assert code == (2 if (name, damage) == ("COMPLETE.json", "deleted") else 1)
    assert isinstance(error, DamagedError) or (name, damage) == ("COMPLETE.json", "deleted")


def every_bit(path: Path, step: int) -> Iterator[tuple[str, int, bytes]]:
    """Every byte of every file with one bit flipped, or of every `step`-th byte: file, place, the file's bytes then."""
    draw = random.Random(0)
    for name in FILES:
        data = (path / name).read_bytes()
        for at in range(draw.randrange(step), len(data), step):
            yield name, at, data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.full)])
def test_a_bit_that_is_flipped_anywhere_is_found_by_load_and_by_verify(path: Path, step: int) -> None:
    count = 0
    for name, at, data in every_bit(path, step):
        before = (path / name).read_bytes()
        (path / name).write_bytes(data)
        for lines in (refusal(path).problems, verify(path)):
            # A flipped bit of a hash in the mark accuses the file that it speaks for, and says that the mark does.
            assert any(name in line for line in lines), (name, at, lines)
        (path / name).write_bytes(before)
        count += 1
    assert count > 100
    assert verify(path) == []
