"""A batch splits into equal consecutive pieces, and a cursor survives JSON."""

import json

import pytest
import torch

from softmoe_train.data.batch import Batch, Broken, Cursor


def batch_of(rows: int) -> Batch:
    images = torch.arange(rows * 3 * 4, dtype=torch.uint8).reshape(rows, 3, 2, 2)
    broken = (Broken("a.tar", "key", "why", "0" * 64, 3),)
    return Batch(
        images, torch.arange(rows), torch.ones(rows, dtype=torch.bool), torch.arange(rows), Cursor(rows), broken
    )


def test_micro_batches_are_consecutive_and_make_up_the_batch() -> None:
    batch = batch_of(6)
    pieces = batch.split(3)
    assert [len(piece) for piece in pieces] == [2, 2, 2]
    for name in ("images", "labels", "mask", "sample_ids"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert [piece.broken for piece in pieces] == [batch.broken, (), ()]


@pytest.mark.parametrize("n", [0, 4, 12])
def test_an_uneven_split_is_refused_with_the_legal_numbers(n: int) -> None:
    with pytest.raises(ValueError, match=rf"6 rows does not split into {n} .* use one of \[1, 2, 3, 6\]"):
        batch_of(6).split(n)


def test_a_batch_moves_with_all_its_tensors() -> None:
    moved = batch_of(2).to("meta")
    assert {
        moved.images.device.type,
        moved.labels.device.type,
        moved.mask.device.type,
        moved.sample_ids.device.type,
    } == {"meta"}
    assert moved.cursor == Cursor(2)


def test_a_cursor_survives_json() -> None:
    assert Cursor.from_json(json.loads(json.dumps(Cursor(123).to_json()))) == Cursor(123)


@pytest.mark.parametrize(
    "value", [None, 3, {}, {"position": "3"}, {"position": -1}, {"position": True}, {"position": 1, "x": 2}]
)
def test_a_damaged_cursor_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="cursor="):
        Cursor.from_json(value)
