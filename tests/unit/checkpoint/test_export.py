"""Exported weights are the checkpoint's, whole or not there, and plain PyTorch computes the run's logits from them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softmoe_train.checkpoint import blocks, export, shards
from softmoe_train.commands.main import main
from softmoe_train.model.init import initialize
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT, build_model
from tests.models import moe_config
from tests.ranks.small import global_batch, model_config, perturb
from tests.runs import environment
from tests.unit.checkpoint.cut import save_cut

PROGRAM = Path(__file__).with_name("plain_vit.py")
W1 = "blocks.1.moe.experts.w1"


def model_of(seed: int, config: ModelConfig | None = None) -> ViT:
    """The small model, or one of `config`, with weights that are nowhere zero or alike."""
    model = build_model(config or model_config(), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, seed)
    perturb(model)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> dict[str, ViT]:
    return {"model": model_of(0), "average": model_of(1)}


@pytest.fixture(scope="module")
def run(models: dict[str, ViT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose checkpoint, of two files, holds weights, their average and something of an optimizer."""
    run = tmp_path_factory.mktemp("run")
    tensors: dict[str, Tensor] = {
        f"{kind}.{name}": tensor for kind, model in models.items() for name, tensor in model.state_dict().items()
    }
    tensors |= {f"optimizer.exp_avg.{W1}": torch.zeros(8, 24, 40), "average.updates": torch.ones(1)}
    documents = {"config": {"model": model_config().model_dump()}, "loop": {"images_seen": 320}}
    save_cut(run / "checkpoints", 20, tensors, documents, files=2)
    return run


def exported(run: Path, folder: Path, *overrides: str) -> Path:
    assert main(["export", f"ckpt={run}", f"out={folder}/weights.safetensors", *overrides]) == 0
    return folder / "weights.safetensors"


def plain_logits(weights: Path, images: Tensor) -> Tensor:
    """What the plain program answers, in a process that cannot import this package."""
    save_file({"images": images}, weights.with_name("images"))
    command = [
        sys.executable,
        "-I",
        str(PROGRAM),
        str(weights),
        *(str(weights.with_name(n)) for n in ("images", "logits")),
    ]
    subprocess.run(command, check=True, env=environment(), cwd=weights.parent)
    return load_file(weights.with_name("logits"))["logits"]


@pytest.mark.parametrize(("kind", "experts"), [("model", "together"), ("average", "separate")])
def test_plain_pytorch_computes_the_logits_of_the_run_s_model(
    run: Path, models: dict[str, ViT], tmp_path: Path, kind: str, experts: str
) -> None:
    weights = exported(run, tmp_path, f"weights={kind}", f"experts={experts}")
    images = global_batch().images
    expected = models[kind](images).logits
    assert expected.std() > 0.1
    # Sums in another order, in float32.
    torch.testing.assert_close(plain_logits(weights, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "moe",
    [
        {"soft": {"combine": "separate", "normalize": False}, "expert": "gated_mlp"},
        {"router": "identity", "num_experts": 8, "slots_per_expert": 2},
        {
            "router": "tokens_choice",
            "tokens_choice": {"top_k": 2},
            "sparse": {"group_images": 4, "capacity_factor": 0.5},
        },
        {"router": "experts_choice", "sparse": {"group_images": 2}, "expert": "gated_mlp"},
    ],
    ids=str,
)
def test_plain_pytorch_computes_the_logits_of_ablations_and_sparse_routers(tmp_path: Path, moe: dict[str, Any]) -> None:
    config = model_config(moe=moe_config(**{"blocks": "last 2", "num_experts": 4, "slots_per_expert": 3, **moe}))
    model = model_of(0, config)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    save_cut(tmp_path / "checkpoints", 20, tensors, {"config": {"model": config.model_dump()}, "loop": {}}, files=2)
    images = global_batch().images
    # Sums in another order, in float32.
    torch.testing.assert_close(plain_logits(exported(tmp_path, tmp_path), images), model(images).logits, rtol=1e-5, atol=1e-5)  # fmt: skip


def test_the_file_holds_float32_weights_by_their_names_and_says_what_they_are(
    run: Path, models: dict[str, ViT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (shards, blocks):
        monkeypatch.setattr(module, "BUFFER", 1000)  # bytes: many blocks a tensor
    path = exported(run, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    held = load_file(path)
    assert held.keys() == models["model"].state_dict().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in models["model"].state_dict().items())
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert (metadata["step"], metadata["images_seen"], metadata["softmoe_format"]) == ("20", "320", "1")
    assert json.loads(metadata["model"]) == model_config().model_dump()
    assert json.loads(metadata["names"]) == export.NAMES
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_every_parameter_of_the_model_is_documented_by_name() -> None:
    words = " ".join(export.NAMES) + " ".join(export.NAMES.values())
    ablated = moe_config(blocks="last 1", soft={"combine": "separate"}, expert="gated_mlp")
    sparse = moe_config(blocks="last 1", router="tokens_choice")
    configs = (model_config(), model_config(moe=ablated), model_config(moe=sparse))
    for name in [name for config in configs for name in build_model(config, torch.float32).state_dict()]:
        last = [part for part in name.split(".") if part not in ("weight", "bias", "blocks") and not part.isdecimal()]
        assert all(part in words for part in last), name


def test_a_file_of_one_expert_holds_that_expert_alone(run: Path, models: dict[str, ViT], tmp_path: Path) -> None:
    path = exported(run, tmp_path, "experts=separate")
    state = models["model"].state_dict()
    for expert in range(8):
        held = load_file(tmp_path / f"weights.expert_{expert:05d}.safetensors")
        assert held.keys() == {name for name in state if ".experts." in name}
        assert all(torch.equal(tensor, state[name][expert]) for name, tensor in held.items())
    assert load_file(path).keys() == {name for name in state if ".experts." not in name}


def test_a_failed_write_leaves_the_file_of_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"before")
    real = export.blocks

    def full(*args: object) -> Iterator[Tensor]:
        yield from real(*args)  # pyright: ignore[reportArgumentType]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "blocks", full)
    assert main(["export", f"ckpt={run}", f"out={tmp_path}/weights.safetensors"]) == 1
    assert "was not written" in (said := capsys.readouterr().err)
    assert "No space left on device" in said
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("weights.safetensors", b"before")]


def test_damaged_weights_are_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_cut(tmp_path, 1, {"model.w": torch.ones(4)}, {"config": {"model": {}}}, files=1)
    file = tmp_path / "step_00000001" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["export", f"ckpt={tmp_path}", f"out={tmp_path}/w.safetensors"]) == 1
    assert "the bytes of model.w are not those that were saved" in capsys.readouterr().err
    file.write_bytes(data[:-1])
    assert main(["export", f"ckpt={tmp_path}", f"out={tmp_path}/w.safetensors"]) == 1
    assert "rank_00000.safetensors has" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "documents", "words"),
    [
        ({"model.w": torch.ones(4)}, {"config": {"model": {}}}, "weights=average needs a run with average=ema"),
        ({"model.w": torch.ones(4), "average.w": torch.ones(4)}, {}, "config.json has no model"),
        ({"loop.w": torch.ones(4)}, {}, "it was not saved by a run"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, tensors: dict, documents: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_cut(tmp_path, 1, tensors, documents, files=1)
    assert main(["export", f"ckpt={tmp_path}", f"out={tmp_path}/w.safetensors", "weights=average"]) == 1
    assert words in capsys.readouterr().err


def test_all_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "ckpt=nowhere", "out=w.pt", "weights=both", "expert=separate"]) == 2
    said = capsys.readouterr().err
    assert "4 mistakes" in said
    for words in (
        "ckpt=nowhere: there is",
        "out=w.pt is not a .safetensors",
        "weights='both'",
        "did you mean experts?",
    ):
        assert words in said
    assert main(["export"]) == 2
    assert "out is not set; name the file to write, as in out=weights.safetensors" in capsys.readouterr().err
