"""Streams give the same global batches on every layout, resume anywhere, and report what they could not read."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.gopen import gopen

from softmoe_train.data import Batch, Cursor, UselessShardsError, WebDatasetConfig, build_eval_stream, build_stream
from softmoe_train.data.order import Order
from softmoe_train.data.records import PaddedCrop, Resize, ResizeCentralCrop
from tests.unit.data.conftest import INCEPTION, encoded, numbered_picture, numbers_of, settings, write_tar

TRANSFORMS = [
    INCEPTION,
    PaddedCrop(kind="padded_crop", padding=1, antialias=True, flip=True),
    ResizeCentralCrop(kind="resize_central_crop", resize=5),
    Resize(kind="resize", resize=5, antialias=True),
]


def stream(cfg: WebDatasetConfig, rank: int = 0, world: int = 1, *, batch: int = 8, size: int = 4, classes: int = 10):
    return build_stream(cfg, image_size=size, num_classes=classes, seed=7, global_batch=batch, rank=rank, world=world)


def passes(cfg: WebDatasetConfig, rank: int = 0, world: int = 1, *, batch: int = 8, size: int = 4, classes: int = 10):
    return build_eval_stream(
        cfg, image_size=size, num_classes=classes, seed=7, batch_size=batch, rank=rank, world=world
    )


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "mask", "sample_ids"))
    return tensors and a.cursor == b.cursor and a.broken == b.broken


def joined(parts: list[Batch]) -> Batch:
    """The global batch of the ranks' parts, in the order of its samples."""
    ids = torch.cat([part.sample_ids for part in parts])
    order = ids.argsort()
    images, labels, mask = (
        torch.cat([getattr(part, n) for part in parts])[order] for n in ("images", "labels", "mask")
    )
    return Batch(images, labels, mask, ids[order], parts[0].cursor, sum((part.broken for part in parts), ()))


def test_a_stream_gives_each_stored_sample_once_an_epoch_across_batch_boundaries(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(7, 1, 13)))  # 21 samples, batches of 8
    seen = [number for batch in islice(stream(cfg), 21) for number in numbers_of(batch.images)]
    for epoch in range(8):
        assert sorted(seen[epoch * 21 : (epoch + 1) * 21]) == list(range(21))


def test_a_stream_names_what_any_rank_gets_without_reading_an_image(numbered_shards, monkeypatch) -> None:
    cfg = settings(train=str(numbered_shards(7, 1, 13)))
    ranks = [stream(cfg, rank, 2) for rank in (0, 1)]
    batches = [(rank, batch) for rank in (0, 1) for batch in islice(ranks[rank], 4)]  # into the second epoch
    shards = [f"train-{shard:06d}.tar" for shard, count in enumerate((7, 1, 13)) for _ in range(count)]
    monkeypatch.setattr(os, "pread", None)
    for rank, batch in batches:
        numbers = numbers_of(batch.images)
        want = [(g, shards[n], f"sample-{n:06d}") for g, n in zip(batch.sample_ids.tolist(), numbers, strict=True)]
        assert ranks[1 - rank].samples(Cursor(batch.cursor.position - 8), rank) == want


def test_batches_hold_what_the_order_says_and_the_cursor_after_it(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(7, 1, 13)))
    order = Order([7, 1, 13], streams=4, window=8, block=4, seed=7)
    for k, batch in enumerate(islice(stream(cfg), 6)):
        where = order.locate(np.arange(k * 8, k * 8 + 8))
        numbers = (np.asarray([0, 7, 8])[where.shard] + where.index).tolist()
        assert batch.images.numpy().transpose(0, 2, 3, 1).tolist() == [numbered_picture(n).tolist() for n in numbers]
        assert batch.labels.tolist() == [n % 10 for n in numbers]
        assert batch.sample_ids.tolist() == list(range(k * 8, k * 8 + 8))
        assert batch.cursor == Cursor(k * 8 + 8)
        assert batch.images.is_contiguous()
        assert batch.images.dtype == torch.uint8
        assert batch.mask.all()


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (2, 2), (4, 1)])
def test_every_layout_gives_the_global_batches_of_one_process_pixel_for_pixel(shared, world: int, workers: int) -> None:
    changes = {"train": str(shared / "flowers5-train-000000.tar"), "train_transform": INCEPTION, "streams": 4}
    alone = list(islice(stream(settings(**changes), batch=16, size=48), 12))
    ranks = [stream(settings(**changes, workers=workers), r, world, batch=16, size=48) for r in range(world)]
    for whole, *parts in zip(alone, *[islice(rank, 12) for rank in ranks], strict=True):
        assert same(joined(parts), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_seeks_goes_on_as_if_uninterrupted(shared, workers: int) -> None:
    train = str(shared / "cifar10-train-{000000..000001}.tar")
    whole = list(islice(stream(settings(train=train), batch=64, size=32), 10))
    resumed = stream(settings(train=train, workers=workers), batch=64, size=32)
    resumed.seek(Cursor.from_json(whole[5].cursor.to_json()))
    assert all(same(a, b) for a, b in zip(whole[6:], islice(resumed, 4), strict=True))


def test_another_global_batch_goes_on_from_the_same_place(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(30, 11)))
    small = list(islice(stream(cfg, batch=4), 30))
    large = stream(cfg, batch=12)
    large.seek(small[4].cursor)
    images = torch.cat([batch.images for batch in small[5:29]])
    assert torch.equal(torch.cat([batch.images for batch in islice(large, 8)]), images)


@pytest.mark.parametrize("position", [-4, 2, 7])
def test_a_position_between_batches_is_refused(numbered_shards, position: int) -> None:
    with pytest.raises(ValueError, match=rf"cursor={position} is not a multiple of data\.streams=4"):
        stream(settings(train=str(numbered_shards(5)))).seek(Cursor(position))


def test_streams_with_fewer_samples_than_streams_still_fill_every_batch(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(3)), streams=8)
    seen = [number for batch in islice(stream(cfg), 6) for number in numbers_of(batch.images)]
    assert all(sorted(seen[start : start + 3]) == [0, 1, 2] for start in range(0, 48, 3))


def test_a_stream_leaves_the_global_generators_alone(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(12)), workers=1, train_transform=INCEPTION)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(islice(stream(cfg), 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_over_all_ranks_in_equal_batches(shared, world: int, workers: int) -> None:
    cfg = settings(test=str(shared / "omniglot40-test-000000.tar"), workers=workers)
    streams = [passes(cfg, rank, world, batch=32, size=28, classes=40) for rank in range(world)]
    batches = [list(one) for one in streams]
    assert {len(one) for one in batches} == {len(streams[0])} == {-(-400 // (32 * world))}
    everything = [batch for one in batches for batch in one]
    assert all(len(batch) == 32 for batch in everything)
    ids = torch.cat([batch.sample_ids[batch.mask] for batch in everything])
    assert sorted(ids.tolist()) == list(range(400))
    assert all((batch.sample_ids[~batch.mask] == -1).all() for batch in everything)
    labels = torch.cat([batch.labels[batch.mask] for batch in everything])
    assert torch.bincount(labels).tolist() == [10] * 40


def test_evaluation_may_run_again_and_is_the_same(numbered_shards) -> None:
    one = passes(settings(test=str(numbered_shards(5, 6))), batch=4)
    assert all(same(a, b) for a, b in zip(one, one, strict=True))
    assert [number for batch in one for number in numbers_of(batch.images[batch.mask])] == list(range(11))


def multi_hot_shard(folder: Path) -> str:
    labels = [b"0 3", b"2", b"1\n4 3", b"4 4"]
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.cls", label), (f"{number}.png", encoded(numbered_picture(number)))]
    return str(write_tar(folder / "multi.tar", members))


def test_multi_hot_labels_are_rows_of_zeros_and_ones(tmp_path: Path) -> None:
    [batch] = passes(settings(test=multi_hot_shard(tmp_path), labels="multi_hot"), batch=5, classes=5)
    rows = [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == rows


def broken_shards(folder: Path) -> str:
    """Twenty samples, ten of them broken in a way of their own."""
    broken = {
        1: [("cls", b"1"), ("png", b"not a picture")],
        3: [("cls", b"3")],
        4: [("png", encoded(numbered_picture(4)))],
        6: [("cls", b"10"), ("png", encoded(numbered_picture(6)))],
        8: [("cls", b"-1"), ("png", encoded(numbered_picture(8)))],
        9: [("cls", b"nine"), ("png", encoded(numbered_picture(9)))],
        11: [("cls", b""), ("png", encoded(numbered_picture(11)))],
        12: [("cls", b"1 2"), ("png", encoded(numbered_picture(12)))],
        15: [("cls", b"5"), ("png", encoded(numbered_picture(15, size=40)))],
        17: [("cls", b"7"), ("png", encoded(numbered_picture(17))[:60])],
    }
    members = []
    for number in range(20):
        whole = [("cls", b"%d" % (number % 10)), ("png", encoded(numbered_picture(number)))]
        members += [(f"{number:02d}.{suffix}", data) for suffix, data in broken.get(number, whole)]
    return str(write_tar(folder / "some-broken.tar", members))


REASONS = {
    "01": "not a readable picture",
    "03": "no picture",
    "04": "no label",
    "06": "outside 0 to 9",
    "08": "outside 0 to 9",
    "09": "not one integer",
    "11": "not one integer",
    "12": "not one integer",
    "15": "40x40 pixels are more than data.max_pixels=400",
    "17": "not a readable picture",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_replaced_and_reported_with_shard_and_key(tmp_path: Path, workers: int) -> None:
    cfg = settings(train=broken_shards(tmp_path), max_broken=100, max_pixels=400, workers=workers)
    order = Order([20], streams=4, window=8, block=4, seed=7)
    reported = []
    for batch in islice(stream(cfg, batch=4), 5):
        reported += batch.broken
        for g, number, label in zip(batch.sample_ids.tolist(), numbers_of(batch.images), batch.labels.tolist()):
            own, step = int(order.locate(np.asarray([g])).index[0]), 0
            while f"{own:02d}" in REASONS:
                step += 1
                own = int(order.locate(np.asarray([order.successor(g, step)])).index[0])
            assert number == own
            assert label == own % 10
    assert sorted(one.key for one in reported) == sorted(REASONS)
    assert all(one.shard == "some-broken.tar" and REASONS[one.key] in one.reason for one in reported)


def test_broken_samples_are_replaced_alike_on_every_layout(tmp_path: Path) -> None:
    cfg = settings(train=broken_shards(tmp_path), max_broken=100, max_pixels=400, train_transform=INCEPTION)
    for whole, *parts in islice(zip(stream(cfg), stream(cfg, 0, 2), stream(cfg, 1, 2)), 10):
        both = joined(parts)
        assert torch.equal(both.images, whole.images)
        assert torch.equal(both.labels, whole.labels)
        assert sorted(both.broken) == sorted(whole.broken)


def test_more_broken_samples_than_allowed_stop_the_run(tmp_path: Path) -> None:
    cfg = settings(train=broken_shards(tmp_path), max_broken=9, max_pixels=400)
    given = []

    def count_broken() -> None:
        given.extend(len(batch.broken) for batch in islice(stream(cfg, batch=4), 20))

    with pytest.raises(
        UselessShardsError, match=r"1\d broken samples .* data\.max_broken=9; the last were\n  some-broken\.tar "
    ):
        count_broken()
    # One batch after that which is too much is still given: a run ends in good order with it.
    assert sum(given[:-2]) <= 9 < sum(given[:-1])


def test_shards_without_a_single_good_sample_stop_the_run_instead_of_searching_for_ever(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "bad.tar", [(f"{n}.png", b"x") for n in range(50)])
    with pytest.raises(UselessShardsError, match=r"of bad\.tar cannot be read .* do not hold what `data` says"):
        next(iter(stream(settings(train=str(path), max_broken=1000))))


def test_evaluation_leaves_broken_images_out_and_reports_them(tmp_path: Path) -> None:
    cfg = settings(test=broken_shards(tmp_path), max_broken=100, max_pixels=400)
    batches = list(passes(cfg, batch=8))
    numbers = [n for batch in batches for n in numbers_of(batch.images[batch.mask])]
    assert numbers == [n for n in range(20) if f"{n:02d}" not in REASONS]
    assert sorted(one.key for batch in batches for one in batch.broken) == sorted(REASONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_members_and_variables_run_nothing_while_streaming(tmp_path: Path, monkeypatch, workers: int) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/rewritten #")
    monkeypatch.chdir(tmp_path)
    members = []
    for number in range(8):
        bombs = [(f"{number}.{suffix}", pickle.dumps(Bomb())) for suffix in ("pyd", "pkl", "pth")]
        members += [(f"{number}.cls", b"1"), (f"{number}.png", encoded(numbered_picture(number))), *bombs]
    write_tar(tmp_path / "pipe:touch piped.tar", members)
    batch = next(iter(stream(settings(train=".", workers=workers))))
    assert sorted(numbers_of(batch.images)) == list(range(8))
    assert not {"unpickled", "rewritten", "piped.tar"} & set(os.listdir(tmp_path))
    gopen(str(tmp_path / "pipe:touch piped.tar")).read()
    assert "rewritten" in os.listdir(tmp_path)  # the trap was live


def test_a_shard_that_changes_under_a_run_stops_it(numbered_shards) -> None:
    folder = numbered_shards(8, 8)
    batches = stream(settings(train=str(folder)))
    write_tar(folder / "train-000001.tar", [("other.cls", b"1")])
    with pytest.raises(ValueError, match=r"train-000001\.tar has changed since"):
        list(islice(batches, 2))


def worker_pids() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ends(pid: int) -> bool:
    """Whether the process is gone, or waits to be reaped, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers under /proc")


@pytest.fixture
def running(numbered_shards) -> Iterator[tuple[Iterator[Batch], list[int]]]:
    """A stream with two workers, both of which have given a batch, and the workers."""
    before = set(worker_pids())
    batches = iter(stream(settings(train=str(numbered_shards(40)), workers=2, prefetch=1)))
    list(islice(batches, 2))  # one of each worker: both are at work
    yield batches, [pid for pid in worker_pids() if pid not in before]
    batches.close()


@linux
def test_the_death_of_a_worker_raises(running) -> None:
    batches, workers = running
    assert len(workers) == 2

    def lose_a_worker() -> None:
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(1)  # torch may raise in its SIGCHLD handler, before the next batch is asked for
        list(islice(batches, 50))

    with pytest.raises(RuntimeError, match="worker"):
        lose_a_worker()


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_meant_for_the_run_does_not_kill_its_workers(running, number: int) -> None:
    batches, workers = running
    for pid in workers:
        # From a process that is not the parent, as SLURM's are.
        subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"], check=True)
    assert len(list(islice(batches, 20))) == 20
    assert set(workers) <= set(worker_pids())


@linux
def test_workers_end_with_the_iterator(running) -> None:
    batches, workers = running
    batches.close()
    assert all(ends(pid) for pid in workers)


@linux
def test_a_worker_still_ends_when_its_parent_asks(running) -> None:
    _, workers = running
    os.kill(workers[0], signal.SIGTERM)
    assert ends(workers[0])


def test_a_stream_that_is_dropped_leaves_no_file_open(numbered_shards) -> None:
    def open_shards() -> list[str]:
        links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if link.is_symlink() and ".tar" in os.readlink(link)]

    gc.collect()
    before = open_shards()
    taken = stream(settings(train=str(numbered_shards(7, 13))))
    next(iter(taken))
    assert len(open_shards()) > len(before)
    del taken
    gc.collect()
    assert open_shards() == before


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda one: one.kind)
def test_a_stream_can_be_sent_to_another_process(numbered_shards, transform) -> None:
    # Where processes are spawned and not forked, workers get a pickled copy.
    one = stream(settings(train=str(numbered_shards(20)), train_transform=transform))
    first = next(iter(one))
    assert same(next(iter(pickle.loads(pickle.dumps(one)))), first)


def test_fingerprints_tell_orders_apart(numbered_shards) -> None:
    folder = str(numbered_shards(10))
    plain = stream(settings(train=folder)).fingerprint()
    assert stream(settings(train=f"{folder}/train-*.tar", workers=2), 1, 2, batch=4).fingerprint() == plain
    for change in ({"streams": 8}, {"shuffle_window": 9}, {"block": 5}):
        assert stream(settings(train=folder, **change)).fingerprint() != plain
    assert "scaled_decode" not in plain
    assert stream(settings(train=folder, scaled_decode=True)).fingerprint() == plain, "a plain resize reads all pixels"
    cropped = settings(train=folder, scaled_decode=True, train_transform=INCEPTION)
    assert stream(cropped).fingerprint() == {**plain, "scaled_decode": True}


def test_after_a_seek_no_more_is_read_than_the_batch_holds_and_all_of_it_within_one_window(tmp_path: Path) -> None:
    picture, label = encoded(numbered_picture(7)), b"1"
    members = [m for n in range(5000) for m in ((f"{n:05d}.png", picture), (f"{n:05d}.cls", label))]
    write_tar(tmp_path / "train.tar", members)
    one = stream(settings(train=str(tmp_path), streams=2, shuffle_window=64, block=16), batch=8)
    one.seek(Cursor(3600))
    assert one.pictures.reader.bytes_read == 0
    next(iter(one))
    read = one.pictures.reader.bytes_read
    assert read == 8 * (len(picture) + len(label))
    # A window of each stream is the most that a shuffle with a buffer would have to fill before this batch.
    assert read <= 2 * 64 * (len(picture) + len(label))
    where = one.order.locate(np.arange(3600, 3608))
    assert len(set(where.index[::2] // 16)) <= 64 // 16 + 1, "of one stream, all from the blocks of one window"


@pytest.mark.parametrize("steps", [[8, 8, 8, 8, 8, 8, 8, 8], [16, 16, 16, 16, 8, 24, 8], [-40, 8, 8, 0, 8]])
def test_locating_batches_ahead_changes_nothing(numbered_shards, steps: list[int]) -> None:
    one = stream(settings(train=str(numbered_shards(7, 1, 13))))
    position = 48
    for step in steps:
        where, truth = one._batches.located(position), one.order.locate(np.arange(position, position + 8))
        assert [part.tolist() for part in where] == [part.tolist() for part in truth]
        position += step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_lie_in_pinned_memory_and_are_the_same(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(40)), workers=2)
    made = build_stream(cfg, image_size=4, num_classes=10, seed=7, global_batch=8, rank=0, world=1, pinned=True)
    for pinned, plain in islice(zip(made, stream(cfg)), 4):
        assert pinned.images.is_pinned() and pinned.labels.is_pinned()
        assert same(pinned, plain)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks for shared memory")
def test_a_workers_images_come_without_being_copied(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(40)), workers=1)
    assert next(iter(stream(cfg))).images.is_shared()
    assert not next(iter(stream(cfg.model_copy(update={"workers": 0})))).images.is_shared()
