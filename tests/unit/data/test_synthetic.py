"""Synthetic pictures follow from (seed, number) alone, and their classes can be learnt."""

from itertools import islice

import pytest
import torch

from softmoe_train.data import Batch, Cursor, SyntheticConfig, build_eval_stream, build_stream


def settings(**changes: object) -> SyntheticConfig:
    sizes = {"streams": 4, "num_train": 24, "num_test": 21}
    values = {"kind": "synthetic", "labels": "hard", "holdout": None, "noise": 40.0, "mixup": None, **sizes}
    return SyntheticConfig.model_validate({**values, **changes})


def train(cfg: SyntheticConfig, rank: int = 0, world: int = 1, *, batch: int = 8, seed: int = 3):
    return build_stream(cfg, image_size=12, num_classes=5, seed=seed, global_batch=batch, rank=rank, world=world)


def held_out(cfg: SyntheticConfig, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(build_eval_stream(cfg, image_size=12, num_classes=5, seed=3, batch_size=4, rank=rank, world=world))


@pytest.mark.parametrize("labels", ["hard", "multi_hot"])
def test_two_ranks_give_the_batches_of_one(labels: str) -> None:
    cfg = settings(labels=labels)
    for whole, *parts in islice(zip(train(cfg), train(cfg, 0, 2), train(cfg, 1, 2)), 5):
        order = torch.cat([part.sample_ids for part in parts]).argsort()
        assert torch.equal(torch.cat([part.images for part in parts])[order], whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts])[order], whole.labels)


def test_seeking_goes_on_as_if_uninterrupted() -> None:
    whole = list(islice(train(settings()), 4))
    resumed = train(settings())
    resumed.seek(whole[1].cursor)
    assert torch.equal(next(iter(resumed)).images, whole[2].images)


def test_a_sample_is_named_by_its_picture() -> None:
    batch = next(iter(train(settings(), 1, 2)))
    named = train(settings(), 0, 2).samples(Cursor(0), 1)
    assert [sample.number for sample in named] == batch.sample_ids.tolist() == [2, 3, 6, 7]
    assert train(settings()).samples(Cursor(24), 0)[2] == (26, "synthetic", "2")


def test_an_epoch_repeats_the_same_images_and_another_seed_has_others() -> None:
    batches = list(islice(train(settings()), 4))
    assert torch.equal(batches[3].images, batches[0].images)
    assert not torch.equal(batches[1].images, batches[0].images)
    assert not torch.equal(next(iter(train(settings(), seed=4))).images, batches[0].images)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_image_once_in_equal_batches(world: int) -> None:
    ranks = [held_out(settings(), rank, world) for rank in range(world)]
    assert len({len(one) for one in ranks}) == 1
    ids = torch.cat([batch.sample_ids[batch.mask] for one in ranks for batch in one])
    assert sorted(ids.tolist()) == list(range(21))


def test_held_out_images_share_the_classes_and_not_the_images_of_training() -> None:
    known = next(iter(train(settings(num_train=400), batch=400)))
    means = torch.stack([known.images[known.labels == label].float().mean(0) for label in range(5)])
    for batch in held_out(settings()):
        nearest = (batch.images.float()[:, None] - means).flatten(2).norm(dim=2).argmin(1)
        assert torch.equal(nearest[batch.mask], batch.labels[batch.mask])
    unseen = torch.cat([batch.images[batch.mask] for batch in held_out(settings())])
    assert not (unseen[:, None] == known.images).flatten(2).all(2).any()


def test_multi_hot_rows_hold_one_or_two_classes() -> None:
    batch = next(iter(train(settings(labels="multi_hot", num_train=400), batch=400)))
    assert batch.labels.dtype == torch.float32
    assert set(batch.labels.sum(1).tolist()) == {1.0, 2.0}


def test_a_position_between_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        train(settings()).seek(Cursor(3))
