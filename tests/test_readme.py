"""Every command of the README runs as written, one after another, as a reader would who works through it; those of the guide to data compose."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from softmoe_train.checkpoint import CheckpointStore
from softmoe_train.commands.bench import MEASURES
from softmoe_train.config import compose, expand_sweep
from softmoe_train.model.vit import build_model
from softmoe_train.settings import RunConfig
from tests.documented import ELSEWHERE, README, Done, Line, lines, prepare, run
from tests.models import moe_config
from tests.ranks.small import model_config
from tests.runs import ROOT
from tests.unit.checkpoint.test_export import plain_logits

pytest.importorskip("sklearn")
LINES = [line for line in lines() if not ELSEWHERE.match(line.text)]
GUIDE = (ROOT / "data" / "README.md").read_text()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Line, Done]]:
    """The folder in which all of them have run in order, and how each ended."""
    folder = tmp_path_factory.mktemp("readme")
    prepare(folder)
    done: dict[str, Done] = {}
    for line in LINES:
        if line.text not in done:  # some stand in a guide and in the reference
            done[line.text] = run(line, folder)
    return folder, {line: done[line.text] for line in LINES}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_a_command_runs(walked: tuple[Path, dict[Line, Done]], line: Line) -> None:
    code, said = walked[1][line]
    assert code == 0, said


@pytest.mark.parametrize("line", [line for line in lines() if ELSEWHERE.match(line.text)], ids=lambda line: line.text)
def test_a_command_for_other_machines_composes(line: Line) -> None:
    of_runs = (word for word in line.words if re.match(r"(?!hydra)[a-z][\w.@]*=(?!interval)", word))
    for words in expand_sweep(list(of_runs)):
        compose(RunConfig, words, lambda _: [])
    for file in re.findall(r"launch/\S+", line.text):
        assert (ROOT / file).is_file()


def test_every_kind_of_command_is_there() -> None:
    verbs = {line.words[line.words.index("softmoe") + 1] for line in LINES}
    assert verbs == {"train", "eval", "finetune", "parity", "plan", "bench", "inspect", "export", "shards", "report"}
    assert {line.words[2] for line in LINES if line.words[:2] == ["softmoe", "bench"]} == set(MEASURES)


def test_indented_blocks_that_are_no_commands_are_what_programs_print() -> None:
    texts = {text for line in lines() for text in [line.text.split(" \\")[0]]}
    blocks = re.findall(r"(?m)(?:^    .*\n)+", re.sub(r"\\\n\s*", "", README))
    others = [block.strip() for block in blocks if block.splitlines()[0].strip() not in texts]
    assert [block.split()[0] for block in others] == ["resumed", "first", "runs/debug/config.yaml"]


def test_links_lead_to_sections() -> None:
    there = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^## (.*)$", README)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= there
    there = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", GUIDE)}
    assert set(re.findall(r"\]\(data/README.md#([^)]+)\)", README)) <= there


@pytest.mark.parametrize(
    "line", [line for line in lines(GUIDE) if "softmoe train" in line.text], ids=lambda line: line.text
)
def test_a_command_of_the_guide_to_data_composes(line: Line) -> None:
    compose(RunConfig, [word for word in line.words[2:] if word != "..."], lambda _: [])


def test_rows_of_the_table_of_changes_compose() -> None:
    table = [row.split("|")[2] for row in README.splitlines() if row.startswith("| ") and row.count("|") == 3]
    spans = [span for cell in table for span in re.findall(r"`([^`]+=[^`]+)`", cell)]
    overrides = [
        shlex.split(span) for span in spans if not span.startswith(("[", "sweep.", "rank", "the ", "data/", "N "))
    ]
    assert len(overrides) > 10
    for words in together([words for words in overrides if all("=" in word for word in words) and "..." not in words]):
        compose(RunConfig, words, lambda _: [])


def together(rows: list[list[str]]) -> list[list[str]]:
    """Rows of different records, composed at once: what is wrong with one is told by its name. What chooses a file is by itself."""
    alone, groups = [], list[tuple[set[str], list[str]]]()
    for words in {tuple(words): words for words in rows}.values():
        keys = {word.partition("=")[0] for word in words}
        if any("@" in key or (ROOT / "conf" / key).is_dir() for key in keys):
            alone.append(words)
            continue
        records = {key.partition(".")[0] for key in keys}
        group = next((group for group in groups if not group[0] & records), None)
        if group is None:
            groups.append(group := (set(), []))
        group[0].update(records), group[1].extend(words)
    return [*alone, *(words for _, words in groups)]


def test_ablations_are_settings_of_the_paper_s_model() -> None:
    section = README.split("## Ablations")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(.*)` \|$", section, flags=re.MULTILINE)
    plain = compose(RunConfig, ["model=soft_s14_256e"], lambda _: []).model
    assert len(rows) == 8
    for row in rows:
        ablated = compose(RunConfig, ["model=soft_s14_256e", *row.split()], lambda _: []).model
        assert ablated.has_experts and ablated != plain


def said_of(walked: tuple[Path, dict[Line, Done]], section: str, words: str) -> Iterator[str]:
    """What the lines of a section that have `words` in them printed."""
    return (done.said for line, done in walked[1].items() if line.section == section and words in line.text)


def test_what_commands_say(walked: tuple[Path, dict[Line, Done]]) -> None:
    stopped, resumed = said_of(walked, "Stop and resume", "softmoe train")
    assert "stopped at step 10 of 20" in stopped
    assert "complete at step 20 of 20" in resumed and "resumed from runs/again/checkpoints/step_00000010" in resumed
    whole, compared, drawn = said_of(walked, "Stop and resume", "softmoe inspect")
    assert "every hash holds" in whole and "every hash holds" not in compared + drawn
    one, several = said_of(walked, "Know the cost first", "softmoe plan")
    assert "8 (this run)" in one and "8 (this run)" not in several
    tuned, chosen = said_of(walked, "Fine-tune", "softmoe finetune")
    assert "runs/finetune-cifar10-of-again-laptop" in tuned and "chosen" in chosen
    (ends,) = said_of(walked, "Fine-tune", "finetune.pets")
    assert "finetune/pets/top1" in ends
    assert "held-out top-1" in (walked[0] / "report.html").read_text()


def test_exported_weights_of_its_run_load_without_this_package(walked: tuple[Path, dict[Line, Done]]) -> None:
    folder = walked[0]
    config = compose(RunConfig, ["recipe=debug"], lambda _: [])
    model = build_model(config.model, torch.float32).to_empty(device="cpu").requires_grad_(False)
    store = CheckpointStore(folder / "runs/again/checkpoints", keep_last=1, rank=0, world=1, group=None)
    path = store.latest()
    assert path is not None
    store.load(path, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, prefix="model.")
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Sums in another order, in float32.
    weights = folder / "weights.safetensors"
    torch.testing.assert_close(plain_logits(weights, images), model(images).logits, rtol=1e-5, atol=1e-5)


def test_the_names_in_the_readme_are_those_of_the_file() -> None:
    section = README.split("## Take the weights elsewhere")[1].split("\n## ")[0]
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    documented = {part for row in rows for span in re.findall(r"`([^`]+)`", row) for part in span.split(".")}
    documented |= {"query_norm", "key_norm"}  # in the row of qkv
    ablated = moe_config(blocks="last 1", soft={"combine": "separate"}, expert="gated_mlp")
    models = [build_model(config, torch.float32) for config in (model_config(), model_config(moe=ablated))]
    for name in [name for model in models for name in model.state_dict()]:
        assert {part for part in name.split(".") if not part.isdecimal()} <= documented, name
