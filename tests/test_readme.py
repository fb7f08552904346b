"""Every `softmoe` command of the documentation composes, and those that need no data of the reader's run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softmoe_train.bench.settings import InferSettings, LayerSettings, StreamSettings
from softmoe_train.checkpoint import CheckpointStore
from softmoe_train.commands.bench import MEASURES
from softmoe_train.commands.main import main
from softmoe_train.config import compose, compose_own
from softmoe_train.model.vit import build_model
from softmoe_train.parity.session import ParityConfig
from softmoe_train.settings import RunConfig
from tests.models import moe_config
from tests.ranks.small import model_config
from tests.runs import ROOT, environment
from tests.unit.checkpoint.test_export import plain_logits

TEXTS = [ROOT / "README.md", ROOT / "data" / "README.md"]
PROGRAM = f"{shlex.quote(sys.executable)} -m softmoe_train"


def commands() -> list[str]:
    """The indented commands of the documentation, continued lines joined."""
    text = "\n".join(path.read_text() for path in TEXTS).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [" ".join(line.split()) for line in lines if re.search(r"\bsoftmoe train\b", line)]


def test_the_documentation_has_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_composes(line: str) -> None:
    overrides = [word for word in shlex.split(line.split("softmoe train", 1)[1]) if word != "..."]
    compose(RunConfig, overrides, lambda _: [])


def lines_of(verb: str) -> list[list[str]]:
    """The overrides of the documented commands of another verb."""
    text = TEXTS[0].read_text()
    return [shlex.split(line) for line in re.findall(rf"^    .*\bsoftmoe {verb} (.*)$", text, flags=re.MULTILINE)]


def test_documented_proofs_and_measurements_compose() -> None:
    proofs, measurements = lines_of("parity"), lines_of("bench")
    assert len(proofs) >= 3
    assert {words[0] for words in measurements} == set(MEASURES)
    for words in [*proofs, *(words[1:] for words in measurements if words[0] != "layer")]:
        own = (*ParityConfig.model_fields, *InferSettings.model_fields, *StreamSettings.model_fields)
        compose(RunConfig, [word for word in words if word.partition("=")[0] not in own], lambda _: [])
    (layer,) = (words[1:] for words in measurements if words[0] == "layer")
    settings, problems = compose_own(LayerSettings, "bench_layer.yaml", layer)
    assert settings is not None
    assert problems == []


def test_rows_of_the_table_of_changes_compose() -> None:
    table = [
        row.split("|")[2] for row in TEXTS[0].read_text().splitlines() if row.startswith("| ") and row.count("|") == 3
    ]
    spans = [span for cell in table for span in re.findall(r"`([^`]+=[^`]+)`", cell)]
    overrides = [shlex.split(span) for span in spans if not span.startswith(("[", "rank", "the ", "data/", "N "))]
    assert len(overrides) > 10
    for words in overrides:
        if all("=" in word for word in words) and "..." not in words:
            compose(RunConfig, words, lambda _: [])


def test_ablations_are_settings_of_the_paper_s_model() -> None:
    section = TEXTS[0].read_text().split("## Ablations")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(.*)` \|$", section, flags=re.MULTILINE)
    plain = compose(RunConfig, ["model=soft_s14_256e"], lambda _: []).model
    assert len(rows) == 8
    for row in rows:
        ablated = compose(RunConfig, ["model=soft_s14_256e", *row.split()], lambda _: []).model
        assert ablated.has_experts and ablated != plain


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the resume example has run as written, and what its two lines said."""
    folder, said = tmp_path_factory.mktemp("readme"), []
    for line in _resume_lines():
        done = subprocess.run(
            line.replace("softmoe", PROGRAM, 1), shell=True, cwd=folder, env=environment(WANDB_MODE="disabled"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return folder, said


def test_the_resume_example_runs_as_written(again: tuple[Path, list[str]]) -> None:
    stopped, resumed = again[1]
    assert "stopped at step 10 of 20" in stopped
    assert "complete at step 20 of 20" in resumed
    assert "resumed from runs/again/checkpoints/step_00000010" in resumed


def _resume_lines() -> tuple[str, str]:
    text = TEXTS[0].read_text().split("## Stop and resume")[1]
    first, second = re.findall(r"^    (softmoe train .*)$", text, flags=re.MULTILINE)[:2]
    return first, second


@pytest.mark.parametrize("words", lines_of("plan"), ids=" ".join)
def test_a_look_at_the_cost_runs_as_written(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "checkpoint" in said
    assert ("8 (this run)" in said) == ("-m" not in words)


@pytest.mark.parametrize("words", lines_of("inspect"), ids=" ".join)
def test_a_look_at_its_checkpoints_runs_as_written(
    again: tuple[Path, list[str]], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(again[0])
    assert main(["inspect", *words]) == 0
    said = capsys.readouterr().out
    assert "runs/again/checkpoints/step_00000020" in said
    assert ("every hash holds" in said) == ("verify=true" in words)


@pytest.mark.parametrize("words", lines_of("report"), ids=" ".join)
def test_a_report_of_its_run_is_made_as_written(
    again: tuple[Path, list[str]], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(again[0])
    assert main(["report", *words]) == 0
    assert "complete" in capsys.readouterr().out
    out = next((word.partition("=")[2] for word in words if word.startswith("out=")), "report.html")
    assert "held-out top-1" in Path(out).read_text()


def test_exported_weights_of_its_run_load_without_this_package(
    again: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = lines_of("export")
    monkeypatch.chdir(again[0])
    assert main(["export", *words]) == 0
    weights = again[0] / "weights.safetensors"
    config = compose(RunConfig, ["recipe=debug"], lambda _: [])
    model = build_model(config.model, torch.float32).to_empty(device="cpu").requires_grad_(False)
    store = CheckpointStore(again[0] / "runs/again/checkpoints", keep_last=1, rank=0, world=1, group=None)
    path = store.latest()
    assert path is not None
    store.load(path, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, prefix="model.")
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Sums in another order, in float32.
    torch.testing.assert_close(plain_logits(weights, images), model(images).logits, rtol=1e-5, atol=1e-5)


def test_the_names_in_the_readme_are_those_of_the_file() -> None:
    section = TEXTS[0].read_text().split("## Take the weights elsewhere")[1].split("\n## ")[0]
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    documented = {part for row in rows for span in re.findall(r"`([^`]+)`", row) for part in span.split(".")}
    documented |= {"query_norm", "key_norm"}  # in the row of qkv
    ablated = moe_config(blocks="last 1", soft={"combine": "separate"}, expert="gated_mlp")
    models = [build_model(config, torch.float32) for config in (model_config(), model_config(moe=ablated))]
    for name in [name for model in models for name in model.state_dict()]:
        assert {part for part in name.split(".") if not part.isdecimal()} <= documented, name


def test_the_torchrun_line_runs_as_written(tmp_path: Path) -> None:
    (line,) = (line for line in commands() if line.startswith("torchrun"))
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
    line = line.replace("torchrun", torchrun, 1).replace("--no-python softmoe", f"--no-python {PROGRAM}")
    done = subprocess.run(
        line,
        shell=True,
        cwd=tmp_path,
        env=environment(WANDB_MODE="disabled"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "complete at step 20 of 20" in done.stdout
