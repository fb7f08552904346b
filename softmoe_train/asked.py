"""This file owns what a person asked for in so many words, and what of it a recipe or another setting would undo."""

from softmoe_train.model.records import ModelConfig

BLOCKS = "model.moe.blocks"


def unread(model: ModelConfig, overrides: list[str]) -> list[str]:
    """What was asked for below `model.moe` that this model does not read: a sentence each. Recipes may say it for other routers."""
    read = model.moe.read_keys() if model.has_experts else {"blocks"}
    why = f"no block of this model holds experts ({BLOCKS})"
    if model.has_experts:
        why = f"model.moe.router={model.moe.router} does not read it"
    asked = [key.removeprefix("model.moe.") for key in _keys(overrides) if key.startswith("model.moe.")]
    return [
        f"model.moe.{key} changes nothing: {why}"
        for key in asked
        if not any(one == key or one.startswith(f"{key}.") for one in read)
    ]


def dense_problems(model: ModelConfig, overrides: list[str]) -> list[str]:
    """Why a dense model that was asked for by name would have experts: a recipe or shrink names blocks for them."""
    names = [value for key, _, value in (override.partition("=") for override in overrides) if key == "model"]
    if not names or not names[-1].startswith("vit_") or not model.has_experts or BLOCKS in _keys(overrides):
        return []
    return [
        f"model={names[-1]} has no experts, but the recipe (or shrink) gives it some: {BLOCKS}={model.moe.blocks!r}; add "
        f'"{BLOCKS}=[]" for the dense model'
    ]


def _keys(overrides: list[str]) -> list[str]:
    return [override.lstrip("+").partition("=")[0] for override in overrides]
