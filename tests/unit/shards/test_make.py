"""Pictures become shards: all of them, in even shards, the same bytes whatever happens on the way."""

import errno
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import webdataset

from softmoe_train.commands.main import main
from softmoe_train.data.decode import decode_image
from tests.unit.shards.conftest import counts, forked, left_out, make, picture, samples, tree, write


def test_each_picture_of_a_folder_comes_once_with_its_class_and_its_own_bytes(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(f"from={pictures}", f"out={out}", "samples_per_shard=9", "test_fraction=0.25") == 0
    found = samples(*out.glob("*.tar"))
    files = {path: path.relative_to(pictures) for path in pictures.rglob("*") if path.is_file()}
    assert {key: (sample["cls"], sample.get("png") or sample.get("jpg")) for key, sample in found.items()} == {
        str(name.with_suffix("")): (str("abc".index(name.parts[0])).encode(), path.read_bytes())
        for path, name in files.items()
    }
    assert (out / "classes.txt").read_text() == "a\nb\nc\n"
    shards = [f"train-{n:06d}.tar" for n in range(4)] + ["test-000000.tar", "test-000001.tar"]
    beside = {
        "classes.txt",
        "left_out.jsonl",
        "make.json",
        "index.json",
        *(f"{shard}.index.safetensors" for shard in shards),
    }
    assert {path.name for path in out.iterdir()} == {*shards, *beside}


def test_shards_are_even_and_hold_a_mixture_and_what_is_held_out_is_of_each_class(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(f"from={pictures}", f"out={out}", "samples_per_shard=9", "test_fraction=0.25")
    assert counts(out) == [7, 8, 7, 8]
    assert counts(out, "test") == [5, 5]
    for shard in out.glob("*.tar"):
        assert len({sample["cls"] for sample in samples(shard).values()}) >= 2
    held_out = Counter(sample["cls"] for sample in samples(*out.glob("test-*.tar")).values())
    assert set(held_out.values()) <= {3, 4}
    told = json.loads((out / "make.json").read_text())["splits"]["test"]
    assert told["labels"] == {label.decode(): count for label, count in sorted(held_out.items())}
    assert told["samples"] == 10


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("samples_per_shard=40", [40]),
        ("shards=3", [13, 13, 14]),
        ("shards=1000", [1] * 40),
        ("shard_mib=0.005", [8] * 5),
    ],
)
def test_shards_have_the_size_that_was_asked_for(
    pictures: Path, tmp_path: Path, size: str, expected: list[int]
) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out", size)
    assert counts(tmp_path / "out") == expected


@pytest.mark.parametrize(("how", "count"), [("test_count=7", 7), ("test_every=6", 6), ("test_fraction=0.5", 20)])
def test_as_many_are_held_out_as_was_asked_for(pictures: Path, tmp_path: Path, how: str, count: int) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out", how)
    assert sum(counts(tmp_path / "out", "test")) == count
    assert sum(counts(tmp_path / "out")) == 40 - count


def test_the_bytes_do_not_depend_on_processes_times_or_the_place(pictures: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    asked = [f"from={pictures}", "samples_per_shard=6", "test_every=5", "resize=8"]
    make(*asked, f"out={one}", "processes=1")
    for path in pictures.rglob("*"):
        os.utime(path, (1, 1))
    make(*asked, f"out={tmp_path}/two", "processes=2")
    assert tree(one) == tree(tmp_path / "two")
    make(*asked, f"out={tmp_path}/seeded", "seed=1")
    assert tree(one)["train-000000.tar"] != tree(tmp_path / "seeded")["train-000000.tar"]


def test_without_a_seed_the_source_s_order_stays(pictures: Path, tmp_path: Path) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out", "seed=null")
    keys = list(samples(tmp_path / "out" / "train-000000.tar"))
    assert keys == sorted(keys, key=lambda key: key.replace("more/", "/").split("/")[:1] + key.split("/"))


def test_webdataset_itself_reads_the_shards(pictures: Path, tmp_path: Path) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out", "samples_per_shard=9")
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = {one["__key__"]: one["cls"] for one in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)}
    assert read == {key: sample["cls"] for key, sample in samples(*map(Path, shards)).items()}
    assert len(read) == 40


def test_a_making_killed_at_any_of_its_moments_goes_on_to_the_same_bytes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"from={pictures}", "samples_per_shard=15", "test_every=4", "resize=8"]
    make(*asked, f"out={tmp_path}/whole")
    replace = os.replace

    def killed_at(moment: int, after: bool) -> None:
        calls = iter(range(1000))

        def counted(one: object, two: object) -> None:
            last = next(calls) == moment
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(one, two)  # type: ignore[arg-type]
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, "replace", counted)
        make(*asked, f"out={out}")

    moments = 0
    for moment in range(0, 100, 2):
        out = tmp_path / f"killed{moment}"
        code = forked(partial(killed_at, moment, after=moment % 4 == 2))
        if code == 0:
            break
        moments += 1
        assert code == -signal.SIGKILL
        assert make(*asked, f"out={out}") == 0
        assert tree(out) == tree(tmp_path / "whole")
    assert (
        moments >= 5
    )  # of twice as many: three parts, two shards and one held out, indexes, what was left out, what was made


def test_one_out_folder_killed_again_and_again_is_made_in_the_end_and_keeps_what_was_done(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"from={pictures}", "samples_per_shard=4", f"out={tmp_path}/out"]
    replace, out = os.replace, tmp_path / "out"

    def killed() -> None:
        calls = iter(range(1000))

        def counted(one: object, two: object) -> None:
            replace(one, two)  # type: ignore[arg-type]
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, "replace", counted)
        make(*asked)

    times: dict[str, int] = {}
    for _ in range(6):
        assert forked(killed) == -signal.SIGKILL
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert times.items() <= now.items()
        times = now
    assert len(times) == 10
    assert make(*asked) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times


def test_a_making_whose_parent_was_killed_leaves_no_worker_that_writes(pictures: Path, tmp_path: Path) -> None:
    for number in range(120):
        write(pictures / "a" / f"q{number}.png", picture(1000 + number, size=48))
    asked = [f"from={pictures}", "samples_per_shard=3", f"out={tmp_path}/out", "processes=2"]
    child = os.fork()
    if child == 0:
        make(*asked)
        os._exit(0)
    while not list((tmp_path / "out").glob("*.tar")):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert make(*asked) == 0  # it would be refused while a worker held the folder
    make(*asked[:-2], f"out={tmp_path}/whole", "processes=1")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_is_made_is_not_made_again_and_a_lost_shard_is(pictures: Path, tmp_path: Path, capsys) -> None:
    asked = [f"from={pictures}", "samples_per_shard=10", f"out={tmp_path}/out"]
    make(*asked)
    before = tree(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    make(*asked)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert "already there" in capsys.readouterr().out
    (tmp_path / "out" / "train-000001.tar").unlink()
    make(*asked)
    assert tree(tmp_path / "out") == before


def test_two_makings_do_not_mix_in_a_folder(pictures: Path, tmp_path: Path, capsys) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out")
    before = tree(tmp_path / "out")
    assert make(f"from={pictures}", f"out={tmp_path}/out", "seed=3") == 1
    assert "seed: 0 there, 3 now" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    write(tmp_path / "other" / "x.tar", b"")
    assert make(f"from={pictures}", f"out={tmp_path}/other") == 1
    assert "x.tar, which no making of ours wrote" in capsys.readouterr().err


def test_what_is_no_good_picture_is_left_out_by_name_and_reason(pictures: Path, tmp_path: Path) -> None:
    bad = pictures / "a"
    write(bad / "zero.jpg", b"")
    write(bad / "notes.txt", b"hello")
    write(bad / "noise.png", b"not a picture at all")
    write(bad / "p000.jpg", picture(500, "JPEG"))
    write(bad / "v1.2.png", picture(501))
    write(bad / "v1_2.png", picture(502))
    write(bad / ".DS_Store", b"x")
    write(bad / "wide.ppm", b"P6 100000 100000 255\n")
    write(bad / os.fsdecode(b"caf\xe9.png"), picture(503))
    write(bad / "two\nlines.png", picture(504))
    write(pictures / "loose.png", picture(505))
    write(pictures / "__x__" / "1.png", picture(506))
    write(bad / "trunc.png", picture(507)[:-200])
    (bad / "out.png").symlink_to(write(tmp_path / "elsewhere.png", picture(508)))
    (bad / "in.png").symlink_to(bad / "p006.png")
    (bad / "gone.png").symlink_to(tmp_path / "nothing.png")
    (bad / "dir").symlink_to(pictures / "b")
    os.mkfifo(bad / "pipe.png")
    out = tmp_path / "out"
    assert make(f"from={pictures}", f"out={out}", "verify=true") == 0
    told = left_out(out)
    expected = {
        "a/zero.jpg": "zero bytes", "a/notes.txt": "unknown suffix .txt", "a/noise.png": "not a readable picture", "a/.DS_Store": "a hidden file",
        "a/wide.ppm": "a decompression bomb (10000000000 pixels)", "a/caf\\udce9.png": "not UTF-8", "a/two\nlines.png": "control character",
        "loose.png": "not in the folder of a class", "__x__/1.png": "webdataset", "a/trunc.png": "not a readable picture",
        "a/out.png": "a link out", "a/gone.png": "cannot be read", "a/dir": "a link to a folder", "a/pipe.png": "not a regular file",
    }  # fmt: skip
    for name, reason in expected.items():
        assert reason in told.pop(name), name
    assert len(told) == 1
    [(name, reason)] = told.items()
    assert "v1_2" in name and "v1.2.png" in reason
    found = samples(*out.glob("*.tar"))
    assert {"a/v1_2", "a/in", "a/p000"} <= found.keys()
    assert len(found) == 40 + 3
    assert (out / "classes.txt").read_text() == "__x__\na\nb\nc\n"


def test_above_max_broken_the_making_stops_with_the_list_and_goes_on_where_more_are_borne(
    pictures: Path, tmp_path: Path, capsys
) -> None:
    for number in range(3):
        write(pictures / "b" / f"bad{number}.jpg", b"\xff\xd8\xff")
    out = tmp_path / "out"
    assert make(f"from={pictures}", f"out={out}", "max_broken=2") == 1
    said = capsys.readouterr().err
    assert "3 files that go into no shard are more than max_broken=2" in said
    assert "3 x not a readable picture" in said
    assert len(left_out(out)) == 3
    assert not list(out.glob("*.tar"))
    assert make(f"from={pictures}", f"out={out}", "max_broken=3") == 0
    assert sum(counts(out)) == 40


def test_a_picture_that_vanishes_after_it_was_looked_at_is_told(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    import softmoe_train.shards.make as making

    real = making.cut

    def cut(*args):  # between the look and the writing
        (pictures / "a" / "p003.JPEG").unlink()
        return real(*args)

    monkeypatch.setattr(making, "cut", cut)
    assert make(f"from={pictures}", f"out={tmp_path}/out", "samples_per_shard=10") == 0
    assert "vanished" in left_out(tmp_path / "out")["a/p003"]
    assert sum(counts(tmp_path / "out")) == 39
    made = json.loads((tmp_path / "out" / "make.json").read_text())
    assert made["splits"]["train"]["samples"] == 39


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(pictures: Path, tmp_path: Path, capfd) -> None:
    asked = [f"from={pictures}", f"out={tmp_path}/out", "samples_per_shard=30"]
    make(*asked[:1], asked[2], f"out={tmp_path}/whole")

    def filled() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        os._exit(make(*asked))

    assert forked(filled) == 1
    said = capfd.readouterr().err
    assert os.strerror(errno.EFBIG) in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert make(*asked) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_all_mistakes_are_told_at_once_and_nothing_is_made(tmp_path: Path, capsys) -> None:
    assert main(["shards", "make", "from=nowhere", "out=x", "quality=0", "shard=4"]) == 2
    said = capsys.readouterr().err
    assert "quality=0" in said and "there is no key shard" in said
    asked = ["from=nowhere", "name=a/b", "shards=3", "samples_per_shard=10", "test_count=3", "test_every=4", "root=."]
    assert main(["shards", "make", *asked]) == 2
    said = capsys.readouterr().err
    for word in (
        "from=nowhere",
        "name='a/b'",
        "out is not set",
        "exactly one",
        "how much is held out",
        "root=. does nothing",
    ):
        assert word in said, word
    assert said.startswith("softmoe shards: 6 mistakes")
    assert not list(tmp_path.iterdir())


def test_what_verify_lets_through_is_without_fault(tmp_path: Path) -> None:
    random_ = random.Random(0)
    whole = [picture(n, kind, 24) for n, kind in enumerate(("PNG", "JPEG", "WEBP", "PPM"))]
    for number in range(120):
        data = bytearray(whole[number % 4])
        for _ in range(random_.choice([1, 4])):
            data[random_.randrange(len(data))] = random_.randrange(256)
        if number % 3 == 0:
            del data[random_.randrange(len(data)) :]
        write(tmp_path / "pictures" / "a" / f"m{number:03d}.{('png', 'jpg', 'webp', 'ppm')[number % 4]}", bytes(data))
    assert make(f"from={tmp_path}/pictures", f"out={tmp_path}/out", "verify=true", "max_broken=120") == 0
    told = left_out(tmp_path / "out")
    assert len(told) + sum(counts(tmp_path / "out")) == 120
    assert 30 < len(told) < 110
    run = ["data=digits", "model.num_classes=1", "batch_size=8", "data.streams=4", "data.test=null", "processes=1"]
    assert main(["shards", "check", *run, f"data.train={tmp_path}/out"]) == 0


def test_pictures_are_made_smaller_upright_and_only_where_they_are_larger(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned: 60 wide and 90 high when upright
    colours = Image.new("RGB", (90, 60), (200, 10, 10))
    colours.paste((10, 10, 200), (0, 0, 45, 60))
    file = tmp_path / "pictures" / "a" / "turned.jpg"
    file.parent.mkdir(parents=True)
    colours.save(file, exif=exif, quality=95)
    small = write(tmp_path / "pictures" / "a" / "small.png", picture(1, size=20))
    colours.save(tmp_path / "pictures" / "a" / "large.png")
    assert make(f"from={tmp_path}/pictures", f"out={tmp_path}/out", "resize=30") == 0
    found = samples(tmp_path / "out" / "train-000000.tar")
    assert found["a/small"]["png"] == small.read_bytes()
    assert decode_image(found["a/large"]["png"], max_pixels=10**6).shape == (30, 45, 3)
    turned = decode_image(found["a/turned"]["jpg"], max_pixels=10**6)
    assert turned.shape == (45, 30, 3)
    upright = decode_image(file.read_bytes(), max_pixels=10**6)
    assert abs(turned[5, 15].astype(int) - upright[10, 30]).max() < 12
    assert abs(turned[40, 15].astype(int) - upright[80, 30]).max() < 12
    make(f"from={tmp_path}/pictures", f"out={tmp_path}/long", "resize=30", "resize_side=long")
    assert decode_image(samples(tmp_path / "long" / "train-000000.tar")["a/large"]["png"], max_pixels=10**6).shape == (
        20,
        30,
        3,
    )
