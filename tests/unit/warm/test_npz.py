"""Arrays of an .npz are read by parts, and never unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.layout import Box
from softmoe_train.warm.npz import read_npz

ARRAY = np.arange(60, dtype=np.float64).reshape(3, 4, 5)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_part_of_an_array_is_what_numpy_has_there(tmp_path: Path, save) -> None:
    save(
        tmp_path / "w.npz",
        **{"params/a": ARRAY, "f": np.asfortranarray(ARRAY), "none": np.zeros((0, 2)), "one": np.float32(7)},
    )
    tensors = read_npz(tmp_path / "w.npz")
    assert {name: t.shape for name, t in tensors.items()} == {
        "params/a": (3, 4, 5),
        "f": (3, 4, 5),
        "none": (0, 2),
        "one": (),
    }
    for name in ("params/a", "f"):
        part = tensors[name].read(Box((1, 2, 0), (2, 1, 5)))
        assert part.dtype == torch.float32
        assert np.array_equal(part.numpy(), ARRAY[1:3, 2:3])
    assert tensors["one"].read(Box((), ())).item() == 7


def test_jax_s_bfloat16_is_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -3.0]).bfloat16()
    np.savez(tmp_path / "w.npz", a=values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_npz(tmp_path / "w.npz")["a"].read(Box((0,), (2,))), values.float())


def test_objects_and_saved_modules_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", good=ARRAY, bad=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match=r"bad: an array of object"):
        read_npz(tmp_path / "w.npz")
    torch.save({"w": torch.ones(2)}, tmp_path / "t.npz")
    with pytest.raises(CheckpointError, match=r"data.pkl"):
        read_npz(tmp_path / "t.npz")
