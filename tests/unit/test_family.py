"""Every model of the paper by its name: what it is, which rows of Table 9 it makes, and the parameters that Table 8 prints."""

from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from softmoe_train.config import compose, config_folder
from softmoe_train.model.records import ModelConfig, moe_blocks
from softmoe_train.settings import RunConfig
from tests.pareto import ParetoRow, pareto_rows
from tests.unit.model.test_vit import COUNTS

FOLDER = config_folder() / "model"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if not file.stem.startswith("_"))
ROUTERS = {"soft": "soft", "tc": "tokens_choice", "ec": "experts_choice"}
WIDTHS = {"ti": 192, "s": 384, "b": 768, "l": 1024, "h": 1280}  # paper.md 2.1
PRINTED = {  # Params of Table 8 (paper.md 3.1), sometimes cut and sometimes rounded
    "vit_s16": "33M", "soft_s16_128e": "933M", "soft_s14_256e": "1.8B", "vit_b16": "108M", "soft_b16_128e": "3.7B", "vit_l16": "333M",
    "soft_l16_128e": "13.1B", "vit_h14": "669M", "soft_h14_128e": "27.3B", "soft_h14_256e": "54.1B",
}  # fmt: skip
# What Tables 2 and 8 have beyond Table 9, and Ti, of which the paper has none.
BEYOND = {"vit_s14", "soft_s14_256e", "soft_h14_256e", "vit_ti16", "soft_ti16_128e"}


@pytest.fixture(scope="module")
def trees() -> dict[str, dict[str, Any]]:
    """The `model` section of each name, composed by Hydra all at once: one by one takes 6 s."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = OmegaConf.to_container(hydra_compose(overrides=[f"+model@{name}={name}" for name in NAMES]))
    assert isinstance(composed, dict)
    return {str(name): tree for name, tree in composed.items()}


def test_the_names_are_the_models_of_the_paper_and_no_others() -> None:
    assert set(NAMES) == {row.name for row in pareto_rows()} | BEYOND


def test_a_name_says_what_the_model_is(trees: dict[str, dict[str, Any]]) -> None:
    for name, tree in trees.items():
        config = ModelConfig.model_validate(tree)
        kind, backbone, *experts = name.split("_")
        size = backbone.rstrip("0123456789")
        assert (config.width, config.patch_size, config.image_size) == (WIDTHS[size], int(backbone[len(size) :]), 224)
        assert config.width * 4 == config.mlp_dim
        half = list(range(config.depth // 2, config.depth))
        assert moe_blocks(config.moe.blocks, config.depth) == ([] if kind == "vit" else half), name
        if kind != "vit":
            assert (config.moe.router, f"{config.moe.num_experts}e") == (ROUTERS[kind], *experts), name
            assert config.moe.expert_init == "identical"  # as released, paper.md 1.3
        if kind == "soft":
            assert config.moe.soft.as_published and config.moe.slots_per_expert == 1
        if kind == "tc":  # paper.md 4.1: batch priority, groups of 8, the released code's rounding
            assert config.moe.tokens_choice.batch_priority and config.moe.sparse.capacity_rounding == "nearest"


@pytest.mark.parametrize("row", pareto_rows(), ids=lambda row: f"{row.row}-{row.name}")
def test_a_row_of_table_9_is_a_name_and_what_it_leaves_open(row: ParetoRow, trees: dict[str, dict[str, Any]]) -> None:
    tree = yaml.safe_load(yaml.safe_dump(trees[row.name]))
    for override in row.overrides[1:]:
        key, value = override.removeprefix("model.moe.").split("=")
        section, leaf = key.split(".")
        assert leaf in tree["moe"][section], override
        tree["moe"][section][leaf] = yaml.safe_load(value)
    config = ModelConfig.model_validate(tree)
    if row.experts is None:
        assert not config.has_experts
        return
    assert (config.num_experts, config.group_images) == (row.experts, row.group_images)
    assert config.group_images * config.num_tokens == row.group_tokens
    # Slots of a group: one an expert, or the capacity that paper.md 4.1 and 4.2 define.
    tokens = row.group_tokens or 0
    share = (row.top_k or 1) * tokens * (row.capacity_factor or 0) / row.experts
    assert config.capacity == (1 if row.kind == "soft" else round(share))


def test_names_and_overrides_compose_in_a_run() -> None:
    rows = {row.row: row for row in pareto_rows()}
    for number in (1, 81, 104, 39):
        row = rows[number]
        model = compose(RunConfig, ["data=synthetic", *row.overrides], lambda _: []).model
        assert model.num_experts == (row.experts or 1)
        assert row.kind == "dense" or model.group_images == row.group_images
        assert row.top_k in (None, model.moe.tokens_choice.top_k)
        assert row.capacity_factor in (None, model.moe.sparse.capacity_factor)


@pytest.mark.parametrize("name", PRINTED)
def test_parameters_are_those_that_table_8_prints(name: str) -> None:
    digits, unit = PRINTED[name][:-1], {"M": 1e6, "B": 1e9}[PRINTED[name][-1]]
    last_place = unit / (10 if "." in digits else 1)
    assert abs(COUNTS[name] - float(digits) * unit) < last_place
