"""`softmoe inspect routing=true`: pictures and numbers of any checkpoint with experts, and a sentence for everything that stands against it."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_train.commands.main import main
from tests.runs import run_here

QUIET = [
    "recipe=debug",
    "steps=2",
    "schedule.warmup_steps=1",
    "observe.wandb.mode=disabled",
    "observe.progress=off",
    "evals=[]",
]
PICTURES = {
    "dispatch_curves", "combine_curves", "token_contribution", "expert_importance", "phi_similarity", "slot_curves",
    "slot_maps_block_1",
}  # fmt: skip


def shard(path: Path, count: int, *, readable: bool = True) -> str:
    """A tar of coloured pictures, or of bytes that are none."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            picture = file.getvalue() if readable else b"no picture"
            for suffix, content in (("png", picture), ("cls", b"%d" % (i % 10))):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def trained(folder: Path, *overrides: str) -> Path:
    return run_here(folder, *QUIET, *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tar = shard(folder / "some-0.tar", 40)
    return trained(folder / "run", "data=cifar10", f"data.train={tar}", f"data.test={tar}", "data.streams=8")


def test_pictures_and_numbers_of_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    asked = [f"ckpt={run}", "routing=true", f"pictures={tmp_path}/new/p", f"out={tmp_path}/out.json", "count=24"]
    assert main(["inspect", *asked]) == 0
    assert {path.stem for path in (tmp_path / "new" / "p").glob("*.png")} == PICTURES
    for path in (tmp_path / "new" / "p").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, f"{path} is blank"
    routing = json.loads((tmp_path / "out.json").read_text())["routing"]
    of = routing["blocks"]["1"]
    assert routing["images"] == 24
    assert of["dispatch_cumulative_mean"][-1] == pytest.approx(1, abs=1e-5)
    assert of["combine_cumulative_mean"][-1] == pytest.approx(1, abs=1e-5)
    assert sum(of["expert_importance"]) == pytest.approx(1, abs=1e-6)
    assert of["token_coverage"]["counts"] and sum(of["token_coverage"]["counts"]) == 24 * 16
    assert "24 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["routing=true", "images={run}/none-*.tar"], "correct the path or the pattern"),
        (["routing=true", "images={bad}"], "none of its images can be read, the first for: "),
        (["routing=true", "pictures={run}/config.yaml"], "is a file; name a folder"),
        (["images={bad}"], "is for routing=true"),
        (["routing=true", "count=0"], "count"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    bad = shard(tmp_path / "bad-0.tar", 3, readable=False)
    words = [word.format(run=run, bad=bad) for word in overrides]
    assert main(["inspect", f"ckpt={run}", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("routing").exists()


def test_a_model_without_experts_and_a_damaged_checkpoint_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = trained(tmp_path / "dense", "model.moe.blocks=[]")
    assert main(["inspect", f"ckpt={dense}", "routing=true"]) == 2
    assert "no block of this model holds experts" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (file,) = damaged.glob("checkpoints/*/*.safetensors")
    content = bytearray(file.read_bytes())
    for at in range(len(content) // 4, len(content), 64):  # in a weight, wherever those lie
        content[at] ^= 1
    file.write_bytes(content)
    assert main(["inspect", f"ckpt={damaged}", "routing=true", f"pictures={tmp_path}/p"]) == 1
    assert "damaged" in capsys.readouterr().err
