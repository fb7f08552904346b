"""The way of a new user: a folder of pictures, some broken, becomes shards, a list of what is broken, and a run without it.

And what he gets wrong is told in one message, with an exit code that is no traceback.
"""

import json
from pathlib import Path

import pytest

from softmoe_train.commands.main import main
from tests.unit.data.conftest import write_tar
from tests.unit.shards.conftest import make, picture, write

RUN = [
    "recipe=debug",
    "data=digits",
    "observe.wandb.mode=disabled",
    "observe.progress=plain",
    "evals=[]",
    "batch_size=8",
]
SHORT = ["steps=6", "schedule.warmup_steps=1", "data.test=null", "data.workers=0"]


def train(folder: Path, data: str, *overrides: str) -> int:
    """`softmoe train` in this process, in the run folder `folder`."""
    return main(["train", *RUN, *SHORT, f"run_dir={folder}", f"data.train={data}", "model.num_classes=3", *overrides])


@pytest.fixture
def made(tmp_path: Path) -> str:
    """Shards of pictures with names from anywhere; two break off after the header, and only decoding tells."""
    for number in range(20):
        name = f"größe {number}.v2.png" if number % 2 else f"below/{number}.PNG"
        write(tmp_path / "pictures" / ("b\u00e4r", "cat")[number % 2] / name, picture(number))
    for number in (30, 31):
        write(tmp_path / "pictures" / "cat" / f"torn{number}.png", picture(number)[:-40])
    write(tmp_path / "pictures" / "cat" / "empty.png", b"")
    assert make(f"from={tmp_path}/pictures", f"out={tmp_path}/shards") == 0
    return f"{tmp_path}/shards/train-*.tar"


def test_what_a_check_quarantines_a_run_never_meets(made: str, tmp_path: Path, capsys) -> None:
    assert train(tmp_path / "with", made) == 0
    met = [json.loads(line)["key"] for line in (tmp_path / "with" / "broken_samples.jsonl").read_text().splitlines()]
    assert set(met) == {"cat/torn30", "cat/torn31"}
    checked = [
        "data=digits",
        f"data.train={made}",
        "data.test=null",
        "model.num_classes=3",
        "batch_size=8",
        "data.streams=8",
    ]
    assert main(["shards", "check", *checked, "processes=1", f"quarantine={tmp_path}/bad.jsonl"]) == 1
    capsys.readouterr()
    for listed in (tmp_path / "bad.jsonl", tmp_path / "with" / "broken_samples.jsonl"):
        run = tmp_path / listed.stem
        assert train(run, made, f"data.quarantine={listed}") == 0
        assert not (run / "broken_samples.jsonl").exists()
        said = capsys.readouterr().out
        assert "data.train: 20 of 22 samples remain" in said
        assert "lists 2 samples, of which 2 are here and left out: train-000000.tar 2" in said


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["data.keep.keys=zzz"], 2, "leave none of the 22 samples of data.train="),
        (["data.classes={shards}/classes.txt"], 3, "where labels are numbers, as `softmoe shards make` writes them, data.classes is null"),
        (["data.label=json:missing"], 3, "it has no label (.json)), and neither can the "),
        (["data.label=json:missing", "data.workers=1"], 3, "correct the setting that the reason names"),
        (["data.classes=/no/file"], 2, "1 mistake in the configuration"),
        (["data.scaled_decode=true"], 2, "only an inception_crop without antialias can read a smaller picture"),
        (["data.train=http://127.0.0.1:1/a.tar", "data.cache.folder={shards}"], 2, "chmod 700, or give another data.cache.folder"),
        (["data.train=http://127.0.0.1:1/a.tar", "data.cache.attempts=1"], 2, "data.train: http://127.0.0.1:1/"),
    ],
)  # fmt: skip
def test_a_mistake_in_what_is_read_is_one_message(
    made: str, tmp_path: Path, capsys, overrides: list[str], code: int, said: str
) -> None:
    (tmp_path / "shards").chmod(0o755)
    words = [word.format(shards=tmp_path / "shards") for word in overrides]
    assert train(tmp_path / "run", made, *words) == code
    told = capsys.readouterr().err
    assert told.startswith("softmoe train: ")
    assert said in told
    assert "Traceback" not in told


def test_shards_are_not_made_among_the_pictures(made: str, tmp_path: Path, capsys) -> None:
    for out in ("pictures", "pictures/cat/shards"):
        assert make(f"from={tmp_path}/pictures", f"out={tmp_path}/{out}") == 2
        assert "what is made would be taken for pictures" in capsys.readouterr().err
        assert not list((tmp_path / "pictures").rglob("*.tar"))


def test_a_stream_of_named_labels_is_measured(tmp_path: Path) -> None:
    members = [
        (f"{n}.{suffix}", data) for n in range(8) for suffix, data in (("cls", b"cat"), ("jpg", picture(n, "JPEG")))
    ]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "classes.txt").write_text("bear\ncat\n")
    own = [
        "data=inception",
        f"data.train={tmp_path}/a.tar",
        f"data.classes={tmp_path}/classes.txt",
        "data.keep.labels=[cat]",
    ]
    short = ["data.workers=1", "model.image_size=16", "images=4", "rounds=1", "warmup=0"]
    assert main(["bench", "stream", *own, *short]) == 0
