"""`softmoe bench` as people meet it: what it prints, what it writes, how it refuses. Nothing here looks at how long anything took."""

import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmoe_train.commands.main import main
from tests.forked import forked
from tests.runs import environment
from tests.unit.data.conftest import encoded, write_tar

QUICK = ["rounds=2", "warmup=1"]
TINY = ["tokens=6", "width=8", "hidden=16", "images=1,2"]


def read(path: Path, bench: str) -> list[dict[str, Any]]:
    """The rows of a result, which says what and where it measured."""
    document = json.loads(path.read_text())
    assert document["bench"] == bench
    assert {"command", "torch", "device", "device_name", "threads", "processes", "time"} <= document["facts"].keys()
    assert document["facts"]["command"].startswith(f"softmoe bench {bench} ")
    assert document["settings"]["rounds"] == 2
    return document["rows"]


def positive(*spreads: dict[str, float]) -> bool:
    return all(0 < s["low"] <= s["median"] <= s["high"] < math.inf for s in spreads)


def test_layer_measures_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    assert main(["bench", "layer", "experts=2,4", "total_slots=4", *TINY, *QUICK, f"out={out}"]) == 0
    rows = read(out, "layer")
    assert [(r["dtype"], r["experts"], r["slots"], r["images"]) for r in rows] == [
        (dtype, experts, 4 // experts, images)
        for dtype in ("float32", "bfloat16")
        for images in (1, 2)
        for experts in (2, 4)
    ]
    for row in rows:
        assert row["flops"] == row["flops_executed"] > 0
        assert {"products", "dense MLP"} <= row["ratios"].keys()
        assert positive(*row["seconds"].values(), *row["ratios"].values())
        assert all(len(seconds) == 2 for seconds in row["seconds_of_rounds"].values())
        assert 0 < row["saved_bytes"] <= row["peak_bytes"] + row["images"] * 6 * 8 * 4, "the input was there before"
        assert row["saved_bytes"] <= row["saved_bytes_bound"]
        assert row["saved_bytes_recomputed"] == row["saved_bytes_recomputed_bound"]
        assert row["parameter_bytes"] > 4 * row["experts"] * 2 * 8 * 16
    shown = capsys.readouterr().out
    assert "4 x 1" in shown and "dense MLP" in shown and "thread" in shown


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_layer_draws_its_grid(tmp_path: Path) -> None:
    picture = tmp_path / "layer.png"
    assert main(["bench", "layer", "experts=2,4", "total_slots=4", *TINY, *QUICK, f"picture={picture}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_infer_compares_with_the_dense_twin(tmp_path: Path) -> None:
    out = tmp_path / "infer.json"
    assert main(["bench", "infer", "recipe=debug", "images=1,3", *QUICK, f"out={out}"]) == 0
    rows = read(out, "infer")
    assert [row["images"] for row in rows] == [1, 3]
    for row in rows:
        assert positive(row["ratio"], *row["seconds"].values())
        assert row["parameters"]["soft"] > row["parameters"]["dense"]
        assert row["images_per_second"]["soft"] == pytest.approx(row["images"] / row["seconds"]["soft"]["median"])


PARTS = ["data", "forward", "backward", "exchange", "reduce", "update", "step"]


def test_step_tells_its_parts(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    assert main(["bench", "step", "recipe=debug", "batches=stream", *QUICK, f"out={out}"]) == 0
    (row,) = read(out, "step")
    assert row["ranks"] == 1
    assert list(row["seconds"]) == PARTS
    assert row["seconds"]["exchange"]["high"] == 0, "nothing travels"
    assert positive(row["utilisation"], *(row["seconds"][part] for part in ("data", "forward", "step")))
    assert row["images_per_second"] == pytest.approx(16 / row["seconds"]["step"]["median"])


def test_a_step_of_sparse_routers_is_measured_in_whole_groups(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    sparse = [
        "model.moe.router=tokens_choice",
        "model.moe.sparse.group_images=4",
        "model.moe.sparse.capacity_factor=1.25",
    ]
    assert main(["bench", "step", "recipe=debug", "micro_batches=2", *sparse, *QUICK, f"out={out}"]) == 0
    (row,) = read(out, "step")
    T, D, H, E, S = 16, 32, 64, 4, 20  # 20 slots of each expert for 64 tokens
    products = {
        "patches": T * 48 * D, "attention": 2 * (T * D * 4 * D + 2 * T * T * D), "mlp": 2 * T * D * H, "gate": T * D * E,
        "experts": 2 * E * S * D * H // 4, "head": D * 10,
    }  # fmt: skip
    assert row["flops_per_image"] == 2 * (3 * sum(products.values()) - products["patches"]), (
        "rows that move are no products"
    )


def test_step_times_the_exchange_between_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    more = ["parallel.sharding=fsdp", "micro_batches=2", "precision=bfloat16", "batch_size=8"]
    done = forked("bench", "step", "recipe=debug", "processes=2", *QUICK, f"out={out}", *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images/s") == 1, "one rank speaks"
    (row,) = read(out, "step")
    assert row["ranks"] == row["expert_axis"] == 2
    assert positive(row["seconds"]["step"], row["seconds"]["exchange"])


def test_exchange_is_measured_beside_the_collective(tmp_path: Path) -> None:
    out = tmp_path / "exchange.json"
    words = ["exchange", "recipe=debug", "processes=2", "images=1,4", *QUICK, f"out={out}"]
    command = [sys.executable, "-m", "softmoe_train", "bench", *words]  # the real program; elsewhere here, its forks
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = read(out, "exchange")
    assert [row["images"] for row in rows] == [1, 4]
    for row in rows:
        assert row["slots_bytes"] == row["images"] * 4 * 2 * 32 * 4
        assert row["sent_bytes"] == 4 * row["slots_bytes"] // 2, "four crossings, half of each stays"
        assert row["bare_sent_bytes"] == row["sent_bytes"]
        assert positive(*row["ratios"].values())
    assert "one all_to_all_single of the same slots a crossing" in done.stdout and "two stages send" not in done.stdout


def test_two_stages_and_the_bare_collective_each_count_their_own_bytes(tmp_path: Path) -> None:
    out = tmp_path / "exchange.json"
    stages = ["parallel.exchange=two_stage", "parallel.node_size=2", "processes=4", "images=1"]
    done = forked("bench", "exchange", "recipe=debug", *stages, *QUICK, f"out={out}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read(out, "exchange")
    assert row["sent_bytes"] == 4 * row["slots_bytes"], "half inside the node and half between nodes"
    assert row["bare_sent_bytes"] == 3 * row["slots_bytes"], "a quarter stays"
    for side, sent in (("both", "sent_bytes"), ("bare both", "bare_sent_bytes")):
        assert row["bytes_per_second"][side] == pytest.approx(row[sent] / row["seconds"][side]["median"])
    assert "two stages send 1.33 times what the bare collective does" in done.stdout


def test_checkpoints_are_measured_beside_memory_and_disk_and_leave_nothing(tmp_path: Path) -> None:
    out, disk = tmp_path / "checkpoint.json", tmp_path / "disk"
    disk.mkdir()
    assert main(["bench", "checkpoint", "recipe=debug", f"folder={disk}", *QUICK, f"out={out}"]) == 0
    (row,) = read(out, "checkpoint")
    assert list(row["ratios"]) == ["blocking", "write", "load"]
    assert positive(*row["ratios"].values(), *row["seconds"].values())
    assert 0 < row["written_bytes"] < row["read_bytes"] < row["written_bytes"] + 50_000, "one file, and its header"
    assert list(disk.iterdir()) == []


def test_stream_is_measured_beside_its_floors_and_the_plain_pipeline(tmp_path: Path) -> None:
    folder, out = tmp_path / "shards", tmp_path / "stream.json"
    folder.mkdir()
    waves = np.add.outer(np.arange(90), np.arange(120)).astype(np.uint8)
    pictures = [
        encoded(np.stack([waves + i, waves * 2, waves.T.repeat(2, 0)[:90].repeat(2, 1)[:, :120]], -1), "JPEG")
        for i in range(9)
    ]
    write_tar(
        folder / "a.tar", [m for i, data in enumerate(pictures) for m in ((f"{i}.cls", b"3"), (f"{i}.jpg", data))]
    )
    own = [
        "data=inception",
        f"data.train={folder}",
        "data.workers=2",
        "model.image_size=32",
        "images=4",
        "megapixels=0.2",
    ]
    assert main(["bench", "stream", *own, "data.scaled_decode=true", *QUICK, f"out={out}"]) == 0
    *rows, cost = read(out, "stream")
    alone = {row["side"]: row for row in rows if row["where"] == "one process"}
    assert list(alone) == ["read", "decode, whole", "decode", "bare loop", "stream", "plain webdataset"]
    assert [row["side"] for row in rows if row["where"] == "2 workers"] == ["stream", "plain webdataset"]
    for row in rows:
        assert positive(row["images_per_second"], *row["ratios"].values())
        assert row["images_per_second"]["median"] > 0 and len(row["seconds_of_rounds"]) == 2
    assert alone["stream"]["images"] == 8
    assert 0 < cost["position_seconds"]["order"] < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["stream", "data=synthetic", "rounds=0"],
            ["data=synthetic has no pictures to decode; give data=inception", "rounds=0"],
        ),
        (
            ["stream", "data=cifar10", "data.train=/none", "data.workers=0"],
            ["data.train_transform.kind=padded_crop: the comparison is of random crops", "data.workers=0: ", "data.train=/none"],
        ),
        (["layer", "experts=3", "width=0"], ["experts=3 does not divide", "width=0: input should be"]),
        (["infer", "recipe=debug", "model.moe.blocks=[]", "imags=2"], ["model has no experts", "did you mean images"]),
        (
            ["infer", "recipe=debug", "processes=2", "compile=true", "parallel.sharding=fsdp", "parallel=default", "modle.width=8"],
            [f"{o}: bench infer measures" for o in ("processes=2", "compile=true", "parallel.sharding=fsdp", "parallel=default")]
            + ["modle.width=8: there is no key"],
        ),
        (["exchange", "model=vit_ti16", "processes=2"], ["model has no experts (model.moe.blocks=[]), so there are no slots"]),
        (["exchange", "recipe=debug", "processes=2", "compile=true"], ["compile=true: bench exchange runs no block"]),
        (["step", "recipe=debug", "batch_size=7", "processes=2", "rounds=x"], ["batch_size=7 does not divide into 2 ranks", "rounds='x'"]),
        (["checkpoint", "recipe=debug", "folder=/none", "rounds=0"], ["folder=/none is not a folder that we may write to", "rounds=0: "]),
        (
            ["infer", "recipe=debug", "model.moe.router=experts_choice", "model.moe.sparse.group_images=4", "images=4,6"],
            ["images=6 with model.moe.sparse.group_images=4: batches are whole routing groups; use multiples of 4"],
        ),
        (["exchange", "recipe=debug", "images=0"], ["no slot travels; use processes=2", "images.0=0: "]),
        (["exchange", "recipe=debug", "processes=2", "parallel.expert_axis=3"], ["parallel.expert_axis=3 does not divide"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_together_and_nothing_starts(
    words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "nothing was started" in told.err
    assert all(text in told.err for text in said), told.err


def test_help_says_what_each_measures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {what} " in shown for what in ("layer", "infer", "step", "exchange", "stream", "checkpoint"))


HUGE = 10**12  # of anything: more bytes than a machine maps


@pytest.mark.parametrize(
    "words",
    [["bench", "layer", f"hidden={HUGE}", "images=1"], ["parity", "recipe=debug", f"model.mlp_dim={HUGE}", "model.width=2048"]],
)  # fmt: skip
def test_memory_that_cannot_be_had_ends_with_a_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 3
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert told.startswith(f"softmoe {words[0]}: ")
    assert "host memory could not be had; use " in told


def test_a_rank_without_memory_says_so_itself(tmp_path: Path) -> None:
    done = forked("bench", "exchange", "recipe=debug", "processes=2", f"images={HUGE}", *QUICK, folder=tmp_path)
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert lines
    assert all(re.match(r"softmoe bench: rank [01]: .* of host memory could not be had; use ", line) for line in lines)
