"""A check finds each kind of fault by shard and key, and nothing where there is none; hostile input never ends it."""

import hashlib
import io
import json
import os
import random
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from softmoe_train.commands.main import main
from tests.unit.data.conftest import SHARED, encoded, numbered_picture, write_tar
from tests.unit.shards.conftest import make, picture, write

RUN = ["data=digits", "model.num_classes=10", "batch_size=8", "data.streams=4", "progress=plain"]


def check(train: Path | str, *overrides: str, test: Path | str = "null") -> int:
    """`softmoe shards check` in this process."""
    return main(["shards", "check", *RUN, f"data.train={train}", f"data.test={test}", "processes=1", *overrides])


def found(path: Path) -> dict[str, set[str]]:
    """The keys of each kind of finding in a document."""
    kinds: dict[str, set[str]] = {}
    for finding in json.loads(path.read_text())["findings"]:
        kinds.setdefault(finding["kind"], set()).add(finding["key"])
    return kinds


def good(*numbers: int) -> list[tuple[str, bytes]]:
    """Members of good samples."""
    return [
        (f"s{n:03d}.{suffix}", data)
        for n in numbers
        for suffix, data in (("cls", b"%d" % (n % 10)), ("png", picture(n)))
    ]


def gif_like_webp() -> bytes:
    """An animation of two frames."""
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.fromarray(numbered_picture(n, 16)) for n in (1, 2)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def damaged_jpeg() -> bytes:
    """A JPEG whose data ends in the middle by a marker, which Pillow decodes without a word, half of it gray."""
    whole = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG"))
    whole[len(whole) // 2 : len(whole) // 2 + 2] = b"\xff\xd9"
    return bytes(whole)


FAULTS = {
    "missing-picture": ("missing picture", [("cls", b"1")]),
    "missing-label": ("missing label", [("png", picture(900))]),
    "empty-picture": ("empty member", [("cls", b"1"), ("png", b"")]),
    "empty-label": ("empty member", [("cls", b""), ("png", picture(901))]),
    "word": ("label malformed", [("cls", b"cat"), ("png", picture(902))]),
    "two": ("label malformed", [("cls", b"1 2"), ("png", picture(903))]),
    "high": ("label out of range", [("cls", b"10"), ("png", picture(904))]),
    "negative": ("label out of range", [("cls", b"-1"), ("png", picture(905))]),
    "noise": ("undecodable picture", [("cls", b"1"), ("png", b"\x89PNG nothing")]),
    "cut-png": ("truncated picture", [("cls", b"1"), ("png", picture(906)[:-30])]),
    "cut-end": ("truncated picture", [("cls", b"1"), ("png", picture(907)[:-6])]),
    "cut-jpeg": ("truncated picture", [("cls", b"1"), ("jpg", picture(908, "JPEG", 64)[:-40])]),
    "damaged-jpeg": ("damaged picture", [("cls", b"1"), ("jpg", damaged_jpeg())]),
    "bomb": ("decompression bomb", [("cls", b"1"), ("ppm", b"P6 100000 100000 255\n")]),
    "large": ("decompression bomb", [("cls", b"1"), ("png", encoded(np.zeros((300, 300, 3), np.uint8)))]),
    "moving": ("animated picture", [("cls", b"1"), ("webp", gif_like_webp())]),
}  # fmt: skip


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A shard with one sample of each fault among good ones, a duplicate key, and a broken tar beside it."""
    members = good(1, 2)
    for key, (_, parts) in FAULTS.items():
        members += [(f"{key}.{suffix}", data) for suffix, data in parts]
    members += [*good(3), ("s001.cls", b"1"), ("s001.png", picture(77))]
    write_tar(tmp_path / "shards" / "a.tar" if (tmp_path / "shards").mkdir() is None else tmp_path, members)
    whole = write_tar(tmp_path / "shards" / "b.tar", good(*range(20, 40))).read_bytes()
    (tmp_path / "shards" / "b.tar").write_bytes(whole[:7000])
    return tmp_path / "shards"


def test_each_fault_is_found_by_its_key_and_each_good_sample_is_good(faulty: Path, tmp_path: Path, capsys) -> None:
    assert check(faulty, f"out={tmp_path}/found.json", "data.max_pixels=80000") == 1
    kinds = found(tmp_path / "found.json")
    expected: dict[str, set[str]] = {"broken tar": {""}, "duplicate key": {"s001"}}
    for key, (kind, _) in FAULTS.items():
        expected.setdefault(kind, set()).add(key)
    assert kinds == expected
    document = json.loads((tmp_path / "found.json").read_text())
    assert (
        document["splits"]["train"]["good"] == 3 + 1 + 1
    )  # the good ones, the animation's first frame, the second of a key
    assert document["problems"] == len(FAULTS) - 1 + 2
    said = capsys.readouterr().out
    for kind in expected:
        assert kind in said
    assert "a.tar cut-jpeg" in said


def test_good_shards_have_no_fault_and_exit_code_zero(tmp_path: Path, capsys) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", good(*range(number * 10, number * 10 + 10)))
    assert check(tmp_path, f"out={tmp_path}/found.json", f"picture={tmp_path}/spread.png") == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["findings"] == []
    assert document["splits"]["train"]["labels"] == {str(n): 3 for n in range(10)}
    assert (document["splits"]["train"]["pixels"]["least"], document["splits"]["train"]["aspect"]["most"]) == (144, 1)
    assert document["feeding"] == {"batch_size": 8, "streams": 4, "ranks": 1, "worlds": [1, 2, 4], "steps": 30 / 8}
    assert "no problem was found" in capsys.readouterr().out
    assert (tmp_path / "spread.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_read_as_training_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "names.txt", b"ant\nbee\n")
    facts = {"a": {"of": "bee"}, "b": {"of": "wasp"}, "c": {}}
    members = [
        (f"{key}.{suffix}", data)
        for key, value in facts.items()
        for suffix, data in (("json", json.dumps(value).encode()), ("png", picture(ord(key))))
    ]
    write_tar(tmp_path / "a.tar", members)
    asked = ["data.label=json:of", f"data.classes={tmp_path}/names.txt", "model.num_classes=2"]
    assert check(tmp_path / "a.tar", *asked, f"out={tmp_path}/found.json") == 1
    assert found(tmp_path / "found.json") == {"label malformed": {"b", "c"}}
    assert json.loads((tmp_path / "found.json").read_text())["splits"]["train"]["labels"] == {"1": 1}


def test_what_a_filter_leaves_out_is_no_fault_and_not_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", good(*range(10)))
    asked = ["data.keep.labels=[3,4]", "data.keep.renumber=true", "model.num_classes=2"]
    assert check(tmp_path / "a.tar", *asked, f"out={tmp_path}/found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())["splits"]["train"]["good"] == 2
    write_tar(tmp_path / "b.tar", [*good(1, 2), ("bad1.png", b"nothing")])
    assert check(tmp_path / "b.tar", "data.keep.keys=^s0") == 0


def test_the_document_does_not_depend_on_processes(faulty: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        check(faulty, f"out={tmp_path}/{processes}.json", f"processes={processes}")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_quarantine_lists_what_training_cannot_use_and_keeps_what_it_listed(faulty: Path, tmp_path: Path) -> None:
    entry = {"shard": "z.tar", "sha256": "0" * 64, "key": "mine", "reason": "I say so"}
    quarantine = write(tmp_path / "q.jsonl", (json.dumps(entry) + "\n").encode())
    check(faulty, f"quarantine={quarantine}", "data.max_pixels=80000")
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert lines[0] == entry
    sha256 = hashlib.sha256((faulty / "a.tar").read_bytes()).hexdigest()
    assert {line["key"] for line in lines[1:]} == FAULTS.keys() - {"moving"}
    assert {(line["shard"], line["sha256"]) for line in lines[1:]} == {("a.tar", sha256)}
    before = quarantine.read_bytes()
    check(faulty, f"quarantine={quarantine}", "data.max_pixels=80000")
    assert quarantine.read_bytes() == before
    write(quarantine, b'{"key": 1}\n')
    assert check(faulty, f"quarantine={quarantine}") == 2
    assert quarantine.read_bytes() == b'{"key": 1}\n'


def test_bytes_that_changed_since_they_were_indexed_are_found(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", good(*range(10)))
    assert check(shard) == 0
    facts = shard.stat()
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        place = tar.getmember("s004.png").offset_data
    data[place + 20] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert check(shard, f"out={tmp_path}/found.json") == 1
    kinds = found(tmp_path / "found.json")
    assert kinds == {"changed since it was indexed": {"s004"}, "not what its index says": {""}}


def test_keys_of_several_shards_and_pictures_of_both_splits_are_notices(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "a.tar", good(1, 2, 3))
    write_tar(tmp_path / "b.tar", good(3, 4))
    write_tar(tmp_path / "test.tar", [*good(50), ("other.cls", b"2"), ("other.png", picture(2))])
    assert check(f"[{tmp_path}/a.tar,{tmp_path}/b.tar]", f"out={tmp_path}/found.json", test=tmp_path / "test.tar") == 0
    assert found(tmp_path / "found.json") == {
        "same key in several shards": {"s003"},
        "same picture in train and test": {"s002"},
    }
    assert "1 keys are in more than one shard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "told"), [("ranks=3", "does not divide into 3 ranks"), ("data.streams=5", "divide the global batch (8)")]
)
def test_a_layout_that_cannot_be_fed_is_a_problem_with_the_legal_ones(tmp_path: Path, asked: str, told: str) -> None:
    write_tar(tmp_path / "a.tar", good(1, 2, 3))
    assert check(tmp_path, asked, f"out={tmp_path}/found.json") == 1
    [finding] = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert finding["kind"] == "layout"
    assert told in finding["reason"]


def test_mistakes_of_both_kinds_of_keys_are_told_at_once(tmp_path: Path, capsys) -> None:
    assert main(["shards", "check", "data.train=nothing", "rank=3", f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    for word in ("data.train=nothing", "out=", "there is no key rank"):
        assert word in said, word
    assert main(["shards", "check", "data=synthetic", "quarantine=x.txt"]) == 2
    assert "quarantine=x.txt is not a .jsonl file" in capsys.readouterr().err


def test_a_worker_that_dies_is_a_message_that_names_the_shard(tmp_path: Path, monkeypatch, capsys) -> None:
    import softmoe_train.shards.examine as examine

    write_tar(tmp_path / "a.tar", good(1, 2))
    write_tar(tmp_path / "deadly.tar", good(3, 4))
    real = examine.decode_image

    def deadly(data: bytes, **how: int) -> object:
        if data == picture(4):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, **how)

    monkeypatch.setattr(examine, "decode_image", deadly)
    assert check(tmp_path, "processes=2") == 1
    said = capsys.readouterr().err
    assert "a worker process ended unexpectedly" in said
    assert "deadly.tar" in said


def mutations(count: int) -> list[bytes]:
    """Tars with bytes changed, cut out, doubled or cut off, in headers and in pictures."""
    random_ = random.Random(0)
    more = {
        "j.cls": b"1",
        "j.jpg": picture(9, "JPEG", 24),
        "w.cls": b"2",
        "w.webp": encoded(numbered_picture(5, 16), "WEBP"),
    }
    members = [*good(1, 2, 3), *more.items()]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name if random_.random() < 0.7 else "deep/" * 30 + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole, made = file.getvalue(), []
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(random_.choice([1, 1, 3, 20])):
            at = random_.randrange(len(data))
            match random_.randrange(6):
                case 0:
                    data[at] ^= 1 << random_.randrange(8)
                case 1:
                    data[at : at + random_.randrange(600)] = b""
                case 2:
                    data[at:at] = data[at : at + random_.randrange(600)]
                case 3:
                    del data[at:]
                    data = data or bytearray(b"\0")
                case 4:
                    start = at // 512 * 512
                    data[start + 124 : start + 136] = random_.choice(
                        [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\xff" * 12]
                    )
                case 5:
                    data[at : at + 16] = random_.randbytes(16)
        made.append(bytes(data))
    return made


def test_two_hundred_mutations_are_each_told_or_good(tmp_path: Path) -> None:
    for number, data in enumerate(mutations(200)):
        write(tmp_path / "shards" / f"m{number:03d}.tar", data)
    assert check(tmp_path / "shards", f"out={tmp_path}/found.json", f"quarantine={tmp_path}/q.jsonl") == 1
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["splits"]["train"]["shards"] == 200
    broken = {finding["shard"] for finding in document["findings"] if finding["kind"] == "broken tar"}
    assert 20 < len(broken) < 200
    assert document["splits"]["train"]["good"] > 20


def test_real_photographs_have_no_fault(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real shards at {SHARED}; set SOFTMOE_SHARED")
    asked = [f"data.test={SHARED}/flowers5-test-000000.tar", "model.num_classes=5"]
    assert check(f"{SHARED}/flowers5-test-000000.tar", *asked, f"out={tmp_path}/found.json") == 0
    assert len(found(tmp_path / "found.json")["same picture in train and test"]) == 50


def test_what_was_made_has_no_fault(pictures: Path, tmp_path: Path) -> None:
    make(f"from={pictures}", f"out={tmp_path}/out", "samples_per_shard=9", "test_every=4")
    assert check(f"{tmp_path}/out/train-*.tar", "model.num_classes=3", test=f"{tmp_path}/out/test-*.tar") == 0


def test_memory_of_a_check_does_not_grow_with_what_it_finds(tmp_path: Path) -> None:
    from softmoe_train.shards.findings import EXAMPLES, Finding, Tally

    tally = Tally()
    for number in range(5000):
        tally.add(Finding("missing label", "train", "a.tar", "0" * 64, str(number), "it has no label"))
    assert len(tally.examples["missing label"]) == EXAMPLES
    assert sum(1 for _ in tally.all()) == tally.problems == 5000
