"""Configuration: every file composes, every mistake is told at once, and nothing is started before."""

from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path

import pytest
import yaml

from softmoe_train.changes import changed_settings
from softmoe_train.config import (
    ConfigError,
    as_yaml,
    compose,
    compose_onto,
    config_folder,
    expand_sweep,
    load_yaml,
    parse,
    save_yaml,
)
from softmoe_train.parallel.layout import ParallelConfig
from softmoe_train.settings import RunConfig, check, compute_problems

FOLDER = config_folder()
FILES = sorted(  # recipes and models have tests of their own: test_recipes, test_family
    (str(file.parent.relative_to(FOLDER)), file.stem)
    for file in FOLDER.rglob("*.yaml")
    if not {FOLDER / "recipe", FOLDER / "model"} & set(file.parents) and file.parent != FOLDER and file.stem[0] != "_"
)
GROUPS = [[name for _, name in files] for _, files in groupby(FILES, key=itemgetter(0))]
NAMES = list(dict.fromkeys(group for group, _ in FILES))
# The first file of every group together, the second of those that have two, and so on.
TOGETHER = [[(group, name) for group, name in zip(NAMES, names, strict=True) if name] for names in zip_longest(*GROUPS)]
PLACES = {"transform": "transform@data.train_transform"}


def compose_alone(*overrides: str) -> RunConfig:
    return compose(RunConfig, list(overrides), lambda _: [])


def problems_of(*overrides: str, size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, list(overrides), lambda config: check(config, size, size))
    return caught.value.problems


@pytest.mark.parametrize("files", TOGETHER, ids=lambda files: " ".join(map("=".join, files)))
def test_every_file_of_a_group_composes(files: list[tuple[str, str]]) -> None:
    compose_alone(*(f"{PLACES.get(group, group)}={f'[{name}]' if group == 'evals' else name}" for group, name in files))


def test_three_misspelt_keys_and_two_illegal_combinations_come_in_one_message() -> None:
    problems = problems_of(
        "recipe=debug", "model.widht=64", "modle.depth=3", "stpes=10", "parallel.expert_axis=3", "schedule.warmup_steps=21",
        size=2,
    )  # fmt: skip
    assert len(problems) == 5, problems
    assert "there is no key model.widht; did you mean model.width" in problems[0]
    assert "there is no key modle.depth; did you mean model.depth" in problems[1]
    assert "there is no key stpes; did you mean steps" in problems[2]
    assert problems[3].startswith(
        "parallel.expert_axis=3 does not divide model.moe.num_experts=4 nor the 2 ranks of this run; 4 experts on 2 ranks allow 1 or 2"
    )
    assert "schedule.warmup_steps=21 plus schedule.cooldown_steps=0 exceed steps=20" in problems[4]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=many", "steps='many': input should be a valid integer"),
        ("steps=0", "steps=0: input should be greater than or equal to 1"),
        ("+model.moe.capacity=2", "model.moe.capacity: there is no such key"),
        ("model=vit_z99", "model=vit_z99: no such file under conf/model; use one of"),
        ("model.patch_size=5", "model.patch_size=5 does not divide model.image_size=16; use one of [1, 2, 4, 8, 16]"),
        ("data.streams=3", "data.streams=3: the number of ranks (1) must divide it"),
        ("micro_batches=3", "micro_batches=3 does not divide the 16 images"),
        ("data=cifar10", "data.train is not set: name a folder"),
        (
            "model.moe={router: tokens_choice, tokens_choice: {top_k: 5}}",
            "model.moe.tokens_choice.top_k=5 is more than model.moe.num_experts=4; use fewer choices or more experts",
        ),
        (
            "model.moe={router: tokens_choice, sparse: {noise_std: 0.0}}",
            "model.moe.tokens_choice.load_loss=0.005 with model.moe.sparse.noise_std=0",
        ),
        (
            "model.moe={router: experts_choice, sparse: {capacity_factor: 0.01}}",
            "gives 4 experts no slot for a group of 1 x 16 tokens; use 0.25 or more",
        ),
        ("schedule.timescale=3", "schedule.timescale=3 with schedule.kind=cosine"),
        ("data.mixup=0", "data.mixup=0: input should be greater than 0"),
        ("data.randaugment=null", "there is no key data.randaugment"),
        ("data.noise=loud", "data.noise='loud': input should be a valid number"),
        ("optim.momentum=0.9", "optim.momentum=0.9: optim.kind=adamw does not use it; set null"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings do nothing here"),
        ("name=a/b", "name='a/b' must be a plain name"),
        ("run_dir=", "run_dir is empty"),
        ("run_dir=/dev/null/x", "/dev/null is not a folder that we may write to"),
        ("model.moe.blocks=last ²", "model.moe.blocks='last ²' is not"),
        ("]=[", "not an override; write key=value"),
        ("steps", "not an override; write key=value"),
    ],
)
def test_a_mistake_names_key_value_rule_and_remedy(override: str, said: str) -> None:
    assert any(said in problem for problem in problems_of("recipe=debug", override)), problems_of(
        "recipe=debug", override
    )


def test_mixup_that_could_not_mix_or_would_weigh_wrong_is_refused() -> None:
    (alone,) = problems_of("recipe=debug", "data.mixup=0.2", "data.streams=16")
    assert alone.startswith("data.mixup=0.2 with data.streams=16: ")
    (weighed,) = problems_of("recipe=debug", "data.mixup=0.2", "data.labels=multi_hot")
    assert weighed.startswith("data.mixup=0.2 with data.labels=multi_hot and loss=softmax: ")
    for legal in (["data.labels=hard"], ["data.labels=multi_hot", "loss=sigmoid"]):
        compose(RunConfig, ["recipe=debug", "data.mixup=0.2", *legal], lambda c: check(c, 1, 1))


def test_missing_and_empty_shards_are_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    problems = problems_of("recipe=cifar10", f"data.train={tmp_path}/gone", f"data.test={tmp_path}/empty", size=2)
    assert len(problems) == 2
    assert "data.train=" in problems[0]
    assert "gone" in problems[0]
    assert "data.test=" in problems[1]


def test_a_brace_pattern_needs_no_quotes_of_hydra() -> None:
    config = compose_alone("recipe=cifar10", "data.train=shards/train-{000000..000003}.tar")
    assert config.data.kind == "webdataset"
    assert config.data.train == "shards/train-{000000..000003}.tar"


def test_unknown_keys_do_not_hide_other_mistakes() -> None:
    tree = compose_alone("recipe=debug").model_dump()
    tree["surplus"] = 1
    tree["data"]["surplus"] = 1
    tree["seed"] = -1
    config, problems = parse(RunConfig, tree)
    assert config is None
    assert sorted(p.split(":")[0] for p in problems) == ["data.surplus", "seed=-1", "surplus"]
    assert tree["surplus"] == 1, "the tree that was given is left alone"


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = compose_alone("recipe=quickstart")
    save_yaml(config.model_dump(), tmp_path / "config.yaml")
    again, problems = parse(RunConfig, load_yaml(tmp_path / "config.yaml"))
    assert problems == []
    assert again == config
    assert yaml.safe_load(as_yaml(config)) == config.model_dump()


def test_a_saved_configuration_cannot_execute(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "config.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(yaml.YAMLError):
        load_yaml(tmp_path / "config.yaml")
    assert not trap.exists()
    (tmp_path / "config.yaml").write_text("name: ${oc.env:HOME}\n")
    assert load_yaml(tmp_path / "config.yaml")["name"] == "${oc.env:HOME}"


def test_an_empty_list_of_evaluators_is_empty_whatever_a_recipe_sets() -> None:
    assert compose_alone("recipe=quickstart", "evals=[]").evals.upstream is None
    assert compose_alone("recipe=quickstart", "evals=[upstream]").evals.upstream is not None


def test_a_model_without_experts_has_none_to_spread() -> None:
    (problem,) = problems_of("recipe=debug", "model.moe.blocks=[]", "parallel.expert_axis=2", size=2)
    assert problem.startswith("parallel.expert_axis=2: this model has no experts to spread")
    (problem,) = problems_of("recipe=debug", "model.moe.blocks=[]", "parallel.recompute=moe")
    assert "no block of this model holds experts" in problem
    auto = compose(RunConfig, ["recipe=debug", "model.moe.blocks=[]"], lambda config: check(config, 2, 2))
    assert auto.model.num_experts == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.exchange=ring", "parallel.exchange='ring': input should be 'flat' or 'two_stage'"),
        ("parallel.exchange_dtype=float16", "parallel.exchange_dtype='float16': input should be 'bfloat16'"),
        ("parallel.exchange_chunks=0", "parallel.exchange_chunks=0: input should be greater than or equal to 1"),
        (
            "parallel.exchange_chunks=3",
            "parallel.exchange_chunks=3 does not divide the 4 images of a micro-batch on each",
        ),
        ("parallel.node_size=1", "parallel.node_size=1: input should be greater than or equal to 2"),
        ("parallel.node_size=2", "parallel.node_size=2 is used by parallel.exchange=two_stage alone"),
        ("parallel.exchange=two_stage", "with 4 of 4 ranks to a host an expert axis of 4 has 4 on a node"),
    ],
)
def test_a_wrong_exchange_is_refused_in_plain_words(override: str, said: str) -> None:
    (problem,) = problems_of("recipe=debug", override, size=4)
    assert problem.startswith(said) or said in problem


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=softmax", "model.num_classes=1"], "loss=softmax with model.num_classes=1: the loss of one class is 0"),
        (
            ["precision=bfloat16", "parallel.exchange_dtype=bfloat16"],
            "parallel.exchange_dtype=bfloat16 with precision=bfloat16: slots are in it already; use null",
        ),
        (["model.moe.blocks=[]", "parallel.exchange_dtype=bfloat16"], "so there are no slots to round; use null"),
        (
            ["parallel.sharding=fsdp", "parallel.reduce_each_micro=true"],
            "parallel.reduce_each_micro=true with micro_batches=1: there is one sum either way",
        ),
    ],
)
def test_what_the_other_settings_make_void_is_refused(overrides: list[str], said: str) -> None:
    (problem,) = problems_of("recipe=debug", *overrides)
    assert said in problem


def test_of_several_hosts_none_judges_alone_what_depends_on_all() -> None:
    run = ["recipe=debug", "parallel.exchange=two_stage"]  # 4 experts: an axis of 4, of which a host of 4 has all
    compose(RunConfig, run, lambda config: compute_problems(config, 16, 4))
    compose(RunConfig, run, lambda config: compute_problems(config, 16, 2))
    with pytest.raises(ConfigError, match=r"parallel\.node_size=3 does not cut an expert axis of 4"):
        compose(RunConfig, [*run, "parallel.node_size=3"], lambda config: compute_problems(config, 16, 4))


def test_time_limits_are_above_zero_and_may_change_under_a_run() -> None:
    limits = ["time_limit=5", "hang_limit=null", "checkpoint.grace=30"]
    limited = compose(RunConfig, ["recipe=debug", *limits], lambda _: [])
    assert (limited.time_limit, limited.hang_limit, limited.checkpoint.grace) == (5, None, 30)
    unlimited = compose(RunConfig, ["recipe=debug"], lambda _: [])
    assert (unlimited.time_limit, unlimited.hang_limit) == (None, 20)
    assert changed_settings(unlimited.as_saved(), limited.as_saved()) == []
    for wrong in ("time_limit=0", "hang_limit=0", "checkpoint.grace=0"):
        with pytest.raises(ConfigError, match=wrong):
            compose(RunConfig, ["recipe=debug", wrong], lambda _: [])


def test_a_laptop_takes_over_nothing_of_a_recipes_layout() -> None:
    assert set(load_yaml(config_folder() / "shrink" / "laptop.yaml")["parallel"]) == set(ParallelConfig.model_fields)


def test_a_run_may_change_its_exchange_but_not_what_it_rounds_to(tmp_path: Path) -> None:
    saved = compose_alone("recipe=debug", f"run_dir={tmp_path}").as_saved()
    now = compose_alone(
        "recipe=debug", f"run_dir={tmp_path}", "parallel.exchange_chunks=2", "parallel.exchange_dtype=bfloat16"
    )
    assert changed_settings(saved, now.as_saved()) == ["parallel.exchange_dtype=bfloat16 (was None)"]


@pytest.mark.parametrize(
    "kinds", [["recipe=debug", "optim=sgd"], ["data=cifar10", "optim=adafactor", "schedule=cosine"]]
)
def test_a_checkpoint_from_before_there_was_a_setting_takes_overrides(kinds: list[str]) -> None:
    now = compose_alone(*kinds)
    saved = now.model_dump()
    for group, key in (("optim", "layer_decay"), ("optim", "frozen"), ("data", "holdout"), ("evals", "fewshot")):
        del saved[group][key]
    del saved["finetune"], saved["evals"]["upstream"]["sets"]
    then = compose_onto(RunConfig, saved, ["seed=7"], lambda _: [])
    assert then == now.model_copy(update={"seed": 7})


def test_an_evaluation_of_fine_tuning_takes_whole_groups() -> None:
    sparse = ["model.moe.router=experts_choice", "model.moe.sparse.group_images=8"]
    (problem,) = problems_of("recipe=debug", "evals=[finetune]", "evals.finetune.batch_size=6", *sparse)
    assert "group_images=8 does not divide evals.finetune.batch_size=6" in problem


def test_a_dense_model_needs_no_test_images_for_its_routers() -> None:
    dense = compose_alone("recipe=quickstart", "evals=[routing]", "model.moe.blocks=[]")
    assert not dense.evals.reads_test(dense.model)
    assert compose_alone("recipe=quickstart", "evals=[routing]").evals.reads_test(compose_alone("recipe=debug").model)


def test_records_are_strict_about_types() -> None:
    assert any("seed='1'" in p for p in problems_of("recipe=debug", "seed='1'"))


def test_a_best_checkpoint_that_could_never_be_is_refused() -> None:
    (unknown,) = problems_of("recipe=debug", "checkpoint.best=highest upstream/test/top2")
    assert unknown.startswith(
        "checkpoint.best=highest upstream/test/top2: nothing measures upstream/test/top2; use one of upst"
    )
    (never,) = problems_of("recipe=debug", "checkpoint.best=lowest upstream/test/loss", "checkpoint.every=7")
    assert "it is measured every 10 steps and checkpoints are made every 7" in never
    (off,) = problems_of("recipe=debug", "evals.upstream=null", "checkpoint.best=lowest upstream/test/loss")
    assert "no evaluator is on" in off
    compose(RunConfig, ["recipe=debug", "checkpoint.best=lowest upstream/test/loss"], lambda c: check(c, 1, 1))


def test_a_run_that_may_go_back_keeps_a_checkpoint_to_go_back_to() -> None:
    (problem,) = problems_of("recipe=debug", "bad_steps.then=rollback", "checkpoint.keep_last=1")
    assert problem.startswith("bad_steps.then=rollback with checkpoint.keep_last=1: ")
    assert problem.endswith("use 2")
    assert problems_of("recipe=debug", "bad_steps.then=forget", "bad_steps.spike=0") == [
        "bad_steps.spike=0: input should be greater than 0",
        "bad_steps.then='forget': input should be 'stop' or 'rollback'",
    ]


def test_what_is_done_about_bad_steps_may_change_under_a_run() -> None:
    stops, goes_on = (compose_alone("recipe=debug", *more).as_saved() for more in ([], ["bad_steps.then=rollback"]))
    assert changed_settings(stops, goes_on) == []


def test_a_sweep_is_every_combination_of_what_hydra_calls_a_sweep() -> None:
    swept = [
        "model=vit_s16,soft_s16_128e",
        "steps=range(10,30,10)",
        "model.moe.blocks=[4,5]",
        "data.train=/a/{0..1}.tar",
        "name='a,b'",
    ]
    points = expand_sweep(swept)
    assert [point[:2] for point in points] == [
        ["model=vit_s16", "steps=10"], ["model=vit_s16", "steps=20"], ["model=soft_s16_128e", "steps=10"], ["model=soft_s16_128e", "steps=20"],
    ]  # fmt: skip
    assert all(point[2:] == swept[2:] for point in points)
