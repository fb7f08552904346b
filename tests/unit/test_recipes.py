"""Recipes: what their headers command composes and fits the documented number of processes; the paper's values are in them."""

import itertools
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import get_args

import pytest

from softmoe_train.config import compose, config_folder, expand_sweep
from softmoe_train.dist import World
from softmoe_train.model.records import ModelConfig, Router
from softmoe_train.optim.groups import DecayConfig
from softmoe_train.optim.schedule import learning_rate
from softmoe_train.parity.session import parity_problems
from softmoe_train.plan.make import make_plan
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from softmoe_train.sweep.settings import compose_sweep, words_of
from tests.pareto import pareto_rows
from tests.runs import same_bits, softmoe, stored

FOLDER = config_folder() / "recipe"
HEADERS = {
    file.stem: [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    for file in sorted(FOLDER.glob("*.yaml"))
    if not file.stem.startswith("_")
}
COMMANDS = [
    (name, found.group(1))
    for name, header in HEADERS.items()
    for line in header
    if (found := re.match(r"(?:Command: +)?softmoe train ([^(]*)", line))
]


def composed(words: str, folder: Path, size: int) -> RunConfig:
    """The run of a header's command on `size` processes, 8 a node, with a shard in place of SHARDS."""
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    (shards / "000000.tar").touch()
    given = [word.replace("SHARDS", str(shards)) for word in shlex.split(words)]
    missing = [f"data.{part}={shards}" for part in ("train", "test") if f"data.{part}=" not in words]
    folders = [] if "run_dir=" in words else [f"run_dir={folder}/run"]
    words_now = [*given, *([] if "recipe=debug" in words else missing), *folders]
    return compose(RunConfig, words_now, lambda config: check(config, size, min(size, 8)))


SWEEPS = [(name, words.removeprefix("-m ")) for name, words in COMMANDS if words.startswith("-m ")]
SINGLE = [(name, words) for name, words in COMMANDS if not words.startswith("-m ")]


def is_between(name: str, words: str) -> bool:
    """Placements with other routers than soft, but for the fewest and the most layers: all are there with soft, and all are read below."""
    found = re.search(r"blocks=\[([\d,]+)\].*router=", words) if name == "placement" else None
    return found is not None and found.group(1) not in ("11", "1,2,3,4,8,9,10,11")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(*command, id="-".join(command).strip(), marks=[pytest.mark.full] * is_between(*command))
        for command in SINGLE
    ],
)
def test_a_headers_command_fits_its_processes(name: str, words: str, tmp_path: Path) -> None:
    (size,) = (int(found.group(1)) for line in HEADERS[name] if (found := re.match(r"Layout: +(\d+) ", line)))
    composed(words.replace("FOLDER_OR_PATTERN", "SHARDS"), tmp_path, size)


def test_the_sweeps_of_experts_against_slots_are_the_rows_that_they_are_said_to_be() -> None:
    """256 slots, one for each token, times the row (paper Figure 6)."""
    assert len(SWEEPS) == 2
    for row, (_, words) in zip((1, 4), SWEEPS, strict=True):
        line = shlex.split(words)
        settings, problems = compose_sweep(words_of(line))
        assert settings is not None and problems == []
        assert settings.fixed_slots == 256 * row and f"run_dir=runs/slots_experts/row_{row}" in line
        for point in expand_sweep(words_of(line).runs):
            (experts,) = (int(word.partition("=")[2]) for word in point if word.startswith("model.moe.num_experts="))
            assert settings.fixed_slots % experts == 0


def test_every_recipe_has_a_command_and_says_what_it_is() -> None:
    assert {name for name, _ in COMMANDS} == set(HEADERS)
    for name, header in HEADERS.items():
        said = {line.split(":")[0]: line for line in header if re.match(r"[A-Z][a-z]+: ", line)}
        needed = {"Reproduces", "Command", "Layout", "Hardware", "Time", "Score", "Reached"}
        assert needed <= set(said), name
        if "JFT" in said.get("Data", "") or "ImageNet" in said.get("Data", ""):
            assert "Unpublished" in said, name
            assert "never by us" in said["Reached"], name


def test_every_placement_is_printed_for_every_router() -> None:
    """Tables 4, 5 and 6: eight placements of 512 experts, with three routers each."""
    printed = [(words, re.search(r"blocks=\[([\d,]+)\]", words)) for name, words in COMMANDS if name == "placement"]
    rows = [(words, found.group(1)) for words, found in printed if found]
    for words, blocks in rows:
        assert f"num_experts={512 // len(blocks.split(','))} " in words
    routers = ["soft", "tokens_choice", "experts_choice"]
    named = [(next((router for router in routers if f"router={router}" in words), "soft"), at) for words, at in rows]
    assert sorted(named) == sorted((router, at) for router in routers for at in {at for _, at in named})
    assert len(named) == 24


def test_scores_of_pareto_are_those_of_table_9() -> None:
    (first,) = (i for i, line in enumerate(HEADERS["pareto"]) if line.startswith("Score:"))
    said = re.findall(
        r"(dense|Soft) ([SBH])/(\d+)(?: (\d+)E)? ([\d.]+), (\d+\.\d)", " ".join(HEADERS["pareto"][first : first + 2])
    )
    rows = {row.name: row for row in pareto_rows()}
    assert len(said) == 6
    for kind, size, patch, experts, jft, shots in said:
        row = rows[f"vit_{size}{patch}".lower() if kind == "dense" else f"soft_{size}{patch}_{experts}e".lower()]
        assert (float(jft), float(shots)) == (row.jft_precision, row.imagenet_10shot)


def test_scores_with_batch_priority_are_to_the_digit_rows_of_table_9() -> None:
    """What the header of batch_priority concludes K=2's capacity from."""
    pattern = r"softmoe train recipe=batch_priority model=(\S+) .*batch_priority=true(?: .*)? \(([\d.]+), ([\d.]+)\)"
    said = [found.groups() for line in HEADERS["batch_priority"] if (found := re.match(pattern, line))]
    rows = {row.row: (row.name, str(row.jft_precision), str(row.imagenet_10shot)) for row in pareto_rows()}
    assert said == [rows[37], rows[49], rows[42], rows[50]]


LAPTOP = ["shrink=laptop", "data=synthetic"]
QUIET = ["observe.wandb.mode=disabled", "observe.progress=off"]
OTHER_ROUTERS = ["ablations model.moe.router=identity", "placement model.moe.router=experts_choice"]


@pytest.mark.parametrize("words", [*HEADERS, *OTHER_ROUTERS])
def test_every_recipe_shrinks_and_needs_no_shards_then(words: str, tmp_path: Path) -> None:
    name = words.split()[0]
    overrides = [f"recipe={words}", *LAPTOP, *QUIET, f"run_dir={tmp_path}", "data.num_test=16"]
    small = compose(RunConfig, " ".join(overrides).split(), lambda c: [*check(c, 1, 1), *check(c, 2, 2)])
    assert (small.name, small.steps) == (name, 40)
    # Two of the 40 steps; all of them: pytest -m full tests/unit/test_recipes.py.
    assert train(small.model_copy(update={"stop_after": 2}), World(0, 1, 0, 1)) == "stopped"


@pytest.mark.parametrize("name", HEADERS)
def test_every_recipe_can_be_proven_with_every_router(name: str) -> None:
    small = compose(RunConfig, [f"recipe={name}", "shrink=model"], lambda _: [])
    sizes = [small.processes, 2]
    tree = small.model.model_dump()
    for router, factor, choices in itertools.product(get_args(Router), (0.5, 2.0), (1, 8)):
        tree["moe"]["router"] = router
        tree["moe"]["sparse"]["capacity_factor"] = factor
        tree["moe"]["tokens_choice"]["top_k"] = choices
        run = small.model_copy(update={"model": ModelConfig.model_validate(tree)})
        assert run.model.has_experts and [parity_problems(run, size, size) for size in sizes] == [[], []], router


@pytest.mark.full
@pytest.mark.parametrize(
    ("recompute", "said"), [("none", r"has ([\d.]+) GiB"), ("block", r"and ([\d.]+) GiB with .*=block")]
)
def test_the_largest_model_needs_on_64_ranks_what_jft_long_says(recompute: str, said: str) -> None:
    found = re.search(said, " ".join(HEADERS["jft_long"]))
    assert found is not None
    run = of_recipe("recipe=jft_long", "model=soft_h14_256e", f"parallel.recompute={recompute}")
    peak = make_plan(run, 64, 8, axes=False).rehearsed.peak
    assert f"{peak / 2**30:.1f}" == found.group(1)


@pytest.mark.full
@pytest.mark.parametrize("name", HEADERS)
def test_a_shrunk_recipe_is_done_in_a_minute(name: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = softmoe(f"recipe={name}", *LAPTOP, folder=tmp_path)
    print(f"| {name} | {time.monotonic() - begin:.0f} s |")
    assert "complete at step 40 of 40" in done.stdout
    assert time.monotonic() - begin < 60


def of_recipe(*overrides: str) -> RunConfig:
    return compose(RunConfig, list(overrides), lambda _: [])


def test_learning_rates_are_those_of_the_released_configuration() -> None:
    """paper.md 5, to the digits that are given there."""
    long = of_recipe("recipe=jft_long").schedule
    rates = {5_000: 5.0e-4, 10_000: 1.0e-3, 20_000: 7.071e-4, 40_000: 5.0e-4, 110_000: 3.015e-4, 1_000_000: 1.0e-4}
    assert {t: learning_rate(long, t, 4_000_000) for t in rates} == pytest.approx(rates, rel=6e-3)  # 1e-4: one digit
    assert learning_rate(long, 110_000, 4_000_000) == pytest.approx(3.015e-4, rel=2e-4)
    starts = {  # where the cool-down begins
        (300_000, 50_000): 2.0e-4, (1_000_000, 50_000): 1.026e-4, (2_000_000, 50_000): 7.161e-5, (4_000_000, 50_000): 5.032e-5,
        (4_000_000, 500_000): 5.345e-5, (9_000_000, 500_000): 3.430e-5, (10_000_000, 500_000): 3.244e-5,
    }  # fmt: skip
    for (steps, cooldown), rate in starts.items():
        schedule = long.model_copy(update={"cooldown_steps": cooldown})
        assert learning_rate(schedule, steps - cooldown, steps) == pytest.approx(rate, rel=2e-4)
        assert learning_rate(schedule, steps - cooldown // 2, steps) == pytest.approx(rate / 2, rel=2e-4)
    pareto = of_recipe("recipe=pareto")
    assert (pareto.steps, pareto.schedule) == (300_000, long)


def test_jft_recipes_have_the_published_hyperparameters() -> None:
    run = of_recipe("recipe=pareto")
    assert (run.batch_size, run.loss, run.model.num_classes, run.model.image_size) == (4096, "sigmoid", 29_593, 224)
    assert (run.optim.kind, run.optim.beta1, run.optim.beta2, run.optim.clip_norm) == ("adamw", 0.9, 0.999, 1.0)
    decay = run.optim.decay
    assert (decay.head, decay.kernels, decay.router_scale) == (3.0, 0.03, 0.03)
    data = run.data
    assert data.kind == "webdataset"
    assert (data.labels, data.mixup, data.randaugment) == ("multi_hot", None, None)
    crop = data.train_transform
    assert crop.kind == "inception_crop"
    assert (crop.min_area, crop.max_area, crop.antialias, crop.flip) == (0.05, 1.0, False, True)


@pytest.mark.parametrize(("words", "learned"), [  # Table 2: whether dispatch and combine are
    ("", ("learned", "learned")),
    ("model.moe.soft.combine=uniform", ("learned", "uniform")),
    ("model.moe.soft.dispatch=uniform", ("uniform", "learned")),
])  # fmt: skip
def test_ablations_are_named_by_dispatch_and_combine(words: str, learned: tuple[str, str]) -> None:
    moe = of_recipe("recipe=ablations", *words.split()).model.moe
    assert (moe.soft.dispatch, moe.soft.combine) == learned
    assert (moe.num_experts, moe.slots_per_expert, moe.blocks) == (256, 1, "last 6")


@pytest.mark.parametrize(
    ("recipe", "batch", "peak", "augmentation", "mixup", "dropout", "epochs"),
    [("in1k", 8192, 3e-3, (2, 10), 0.2, 0.2, 300), ("in21k", 4096, 8e-4, (2, 20), 0.5, 0.0, 300)],
)
def test_imagenet_recipes_have_the_published_hyperparameters(
    recipe: str, batch: int, peak: float, augmentation: tuple[int, int], mixup: float, dropout: float, epochs: int
) -> None:
    """paper.md 4.4; the Soft recipe of each differs in the model alone."""
    sparse, soft = of_recipe(f"recipe=vmoe_{recipe}"), of_recipe(f"recipe=soft_{recipe}")
    for run in (sparse, soft):
        assert (run.batch_size, run.loss, run.model.moe.expert_dropout) == (batch, "sigmoid", dropout)
        assert run.data.kind == "webdataset" and run.data.randaugment is not None
        assert (run.data.randaugment.layers, run.data.randaugment.magnitude, run.data.mixup) == (*augmentation, mixup)
        images = {"in1k": 1_268_355, "in21k": 14_094_722}[recipe]
        assert run.steps == epochs * images // batch
        assert learning_rate(run.schedule, 10_000, run.steps) == peak
        assert learning_rate(run.schedule, run.steps - 1, run.steps) == pytest.approx(1e-5, rel=0.02)
        assert (run.optim.decay, run.optim.clip_norm) == (DecayConfig(head=0.1, kernels=0.1, router_scale=0.0), 1.0)
    moe = sparse.model.moe
    assert (moe.router, moe.num_experts, moe.tokens_choice.top_k, moe.group_images) == ("tokens_choice", 8, 2, 8)
    assert (moe.sparse.capacity_factor, moe.tokens_choice.batch_priority) == (1.05, False)
    assert (moe.tokens_choice.importance_loss, moe.tokens_choice.load_loss) == (0.005, 0.005)
    assert soft.model.moe.soft.as_published and soft.model.num_experts == 128
    assert sparse.model_dump(exclude={"name", "run_dir", "model"}) == soft.model_dump(
        exclude={"name", "run_dir", "model"}
    )


def test_a_cooldown_from_a_kept_checkpoint_is_the_run_that_was_planned_so_short(tmp_path: Path) -> None:
    """What the header of jft_long says of its shorter rows, to the last bit."""

    def run(name: str, steps: int, *words: str) -> Path:
        own = [
            "schedule=rsqrt",
            "schedule.warmup_steps=2",
            "schedule.cooldown_steps=2",
            "schedule.timescale=2",
            "checkpoint.every=3",
        ]
        overrides = [
            "recipe=debug",
            f"run_dir={tmp_path / name}",
            f"steps={steps}",
            *own,
            *QUIET,
            "evals.upstream.every=0",
            *words,
        ]
        train(compose(RunConfig, overrides, lambda config: check(config, 1, 1)), World(0, 1, 0, 1))
        return tmp_path / name

    short, long = run("short", 5), run("long", 50, "stop_after=3")
    shutil.copytree(long / "checkpoints" / "step_00000003", tmp_path / "cooled" / "checkpoints" / "step_00000003")
    assert same_bits(stored(run("cooled", 5, "allow_changes=true"), 5), stored(short, 5))
