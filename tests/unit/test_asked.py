"""What was asked for and would do nothing, or something else."""

from collections.abc import Callable

import pytest

from softmoe_train.asked import dense_problems, unread
from softmoe_train.commands.bench import bench
from softmoe_train.commands.parity import parity
from softmoe_train.commands.plan import plan
from softmoe_train.commands.train import train
from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig


def test_what_the_router_does_not_read_is_told() -> None:
    asked = ["model.moe.slots_per_expert=2", "+model.moe.sparse.group_images=2", "model.moe.num_experts=8", "steps=3"]

    def told(*overrides: str) -> list[str]:
        composed = compose(RunConfig, ["recipe=debug", *(a.lstrip("+") for a in asked), *overrides], lambda _: [])
        return unread(composed.model, asked)

    assert told() == ["model.moe.sparse.group_images changes nothing: model.moe.router=soft does not read it"]
    assert told("model.moe.router=experts_choice") == [
        "model.moe.slots_per_expert changes nothing: model.moe.router=experts_choice does not read it"
    ]
    none = "changes nothing: no block of this model holds experts (model.moe.blocks)"
    keys = ["slots_per_expert", "sparse.group_images", "num_experts"]
    assert told("model.moe.blocks=[]") == [f"model.moe.{key} {none}" for key in keys]


def test_a_dense_model_that_a_recipe_would_give_experts_is_refused() -> None:
    def told(*asked: str) -> list[str]:
        return dense_problems(compose(RunConfig, list(asked), lambda _: []).model, list(asked))

    assert told("recipe=debug", "model=vit_s16") == [
        "model=vit_s16 has no experts, but the recipe (or shrink) gives it some: model.moe.blocks='last 1'; add "
        '"model.moe.blocks=[]" for the dense model'
    ]
    assert len(told("model=vit_s16", "shrink=laptop")) == 1
    assert told("recipe=debug", "model=vit_s16", "model.moe.blocks=[]") == []
    assert told("recipe=soft_in1k", "model=vit_s16") == []
    assert told("recipe=debug", "model=soft_s16_128e") == []


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": lambda overrides: train(overrides, print_only=False),
    "plan": plan,
    "parity": parity,
    "bench step": lambda overrides: bench("step", overrides),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_it_before_anything_starts(verb: str) -> None:
    with pytest.raises(ConfigError, match="model=vit_ti16 has no experts, but the recipe"):
        VERBS[verb](["recipe=debug", "model=vit_ti16"])


def test_a_plan_tells_what_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    plan(["recipe=debug", "model.moe.sparse.group_images=3"])
    assert "softmoe plan: model.moe.sparse.group_images changes nothing" in capsys.readouterr().err
