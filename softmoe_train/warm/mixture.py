"""This file owns what other experts, or another router, do to the function of weights that are taken over: each change in a sentence.

What only training draws (noise, dropout, auxiliary losses) changes no function. E experts  S slots per expert  K choices  T tokens
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from softmoe_train.config import flat
from softmoe_train.model.records import ModelConfig, MoEConfig

# Read by the layer, and of no effect on what trained weights compute; or told in a sentence of their own.
OF_TRAINING = {
    "expert_init", "expert_dropout", "sparse.noise_std", "tokens_choice.importance_loss", "tokens_choice.load_loss",
    "tokens_choice.gshard_loss",
}  # fmt: skip
TOLD_APART = {"blocks", "router", "num_experts", "slots_per_expert"}
NOT_THE_DENSE_MLP = {
    "soft": "slots are means of tokens, and an MLP of a mean is not the mean of the MLPs",
    "tokens_choice": "the gates of a token sum to one only over all experts with room for all (top_k = E, capacity_factor 1 or more)",
    "experts_choice": "the gates of a token sum to one only where every expert takes every token (capacity_factor E or more)",
}


class Mixture(NamedTuple):
    """The experts of one side, and the tokens of its images."""

    moe: MoEConfig
    num_tokens: int

    @property
    def has_room(self) -> bool:
        """Whether an expert could take all tokens of its group."""
        return self.moe.capacity(self.num_tokens) >= self.moe.group_images * self.num_tokens

    @property
    def is_dense(self) -> bool:
        """Whether experts that are all the same MLP are that MLP: tokens are not mixed, and the weights of each sum to one."""
        if self.moe.router == "tokens_choice":
            return self.has_room and self.moe.choices == self.moe.num_experts
        return self.moe.router == "identity" or (self.moe.router == "experts_choice" and self.has_room)

    def reading(self) -> tuple[Any, ...]:
        """What decides, for a sparse router with given gates, who reads what; the same for copies of all experts in whole numbers.

        Copies have equal gates, so that the K largest of E are the k·K largest of k·E, and the copies of one expert serve the same tokens.
        """
        moe = self.moe
        if self.is_dense:
            return ("all",)
        share = Fraction(moe.choices, moe.num_experts) if moe.router == "tokens_choice" else None
        if self.has_room:  # of tokens choice: nothing competes
            return (moe.router, share)
        priority = share is not None and moe.tokens_choice.batch_priority
        return (moe.router, share, moe.capacity(self.num_tokens), moe.group_images, priority)


def mixture_of(model: Mapping[str, Any], here: ModelConfig) -> Mixture | None:
    """A source's experts by its settings; what these do not tell is taken to be as here. None: they cannot be read."""
    told = flat(dict(model))
    moe = {key: told.get(f"moe.{key}", value) for key, value in flat(here.moe.model_dump()).items()}
    values: dict[str, Any] = {}
    for key, value in moe.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    try:
        side = int(told.get("image_size", here.image_size)) // int(told.get("patch_size", here.patch_size))
        return Mixture(MoEConfig(**values), side * side)
    except (ValueError, TypeError, ZeroDivisionError):
        return None


def upcycled_differences(here: Mixture, blocks: str) -> list[str]:
    """Why experts that are copies of the dense MLPs of these blocks are not those MLPs."""
    if here.is_dense:
        return []
    router = here.moe.router
    return [f"dense MLPs ({blocks}) became experts of model.moe.router={router}: {NOT_THE_DENSE_MLP[router]}"]


def kept_differences(model: Mapping[str, Any], config: ModelConfig, fresh: Sequence[str]) -> list[str]:
    """Why blocks that have experts on both sides compute something else; `fresh` are parameters of their routers."""
    there, here = mixture_of(model, config), Mixture(config.moe, config.num_tokens)
    if there is None:
        unknown = "so whether its experts compute the same here is not known"
        return [f"the source's model.moe settings cannot be read, {unknown}"]
    if there.moe.num_experts == 1 and there.is_dense:
        return upcycled_differences(here, "one expert that reads every token")
    both_sparse = there.moe.is_sparse and here.moe.is_sparse
    if both_sparse and here.moe.num_experts % there.moe.num_experts == 0 and there.reading() == here.reading():
        return []
    return [
        *_router_differences(there.moe, here.moe, fresh),
        *_size_differences(there.moe, here.moe),
        *_other_settings(model, there.moe, here.moe),
    ]


def _router_differences(there: MoEConfig, here: MoEConfig, fresh: Sequence[str]) -> list[str]:
    differences = []
    if there.router != here.router:
        differences.append(
            f"the experts were trained under model.moe.router={there.router}, and it is {here.router} here"
        )
    # A source without a factor of its logits had 1, as a fresh one has.
    trained = [
        name for name in fresh if not (name.endswith(".scale") and there.router == "soft" and not there.soft.scale)
    ]
    if trained:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        differences.append(f"a router starts fresh in the place of one that was trained: {trained[0]}{more}")
    return differences


def _size_differences(there: MoEConfig, here: MoEConfig) -> list[str]:
    old, new = there.num_experts, here.num_experts
    differences = _not_whole("num_experts", "experts", old, new)
    if new > old and not differences and here.router == there.router == "identity":
        differences.append(f"model.moe.num_experts: {old} there, {new} here: tokens go to other experts than before")
    if new > old and not differences and here.is_sparse and there.is_sparse:
        share = f"model.moe.num_experts: {old} there, {new} here: the {new // old} copies of an expert divide its gate"
        differences.append(f"{share}, and tokens do not reach all of them as they reached the one")
    # Where there are no logits on a side, all its slots are the same, and their number changes nothing.
    if here.router == there.router == "soft" and "soft.normalize" in there.read_keys() & here.read_keys():
        differences += _not_whole("slots_per_expert", "slots", there.slots_per_expert, here.slots_per_expert)
    return differences


def _not_whole(key: str, what: str, old: int, new: int) -> list[str]:
    if new < old:
        return [f"model.moe.{key}: {old} there, {new} here: the {what} after the first {new} are left out"]
    if new % old:
        return [
            f"model.moe.{key}: {old} there, {new} here, no whole multiple: some {what} have more copies, and so more weight, than others"
        ]
    return []


def _other_settings(model: Mapping[str, Any], there: MoEConfig, here: MoEConfig) -> list[str]:
    """The settings that both routers read, where the source's are others or are not told."""
    told, now = flat(dict(model)), flat(here.model_dump())
    keys = (there.read_keys() & here.read_keys()) - OF_TRAINING - TOLD_APART
    if here.soft.scale:  # the source's was taken over, or it had none, which is a fresh one's 1
        keys -= {"soft.scale"}
    other = {key: told.get(f"moe.{key}", "not told") for key in sorted(keys) if told.get(f"moe.{key}", ()) != now[key]}
    if not other:
        return []
    named = "; ".join(f"model.moe.{key}: {value} there, {now[key]} here" for key, value in other.items())
    return [f"settings of the experts are not the source's: {named}"]
