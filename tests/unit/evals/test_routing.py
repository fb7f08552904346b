"""Routing measures against the same in numpy and float64, from the tokens that a layer was given and its parameters alone."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softmoe_train.config import config_folder, load_yaml, parse
from softmoe_train.data.batch import Batch
from softmoe_train.evals import looks
from softmoe_train.evals.routing import RoutingConfig, RoutingEvaluator
from softmoe_train.model.init import initialize
from softmoe_train.model.vit import ViT, build_model
from softmoe_train.observe.figures import Alarm
from tests.models import moe_config
from tests.ranks.small import global_batch, model_config, perturb
from tests.unit.evals import direct_routing as direct


def config(**thresholds: float) -> RoutingConfig:
    tree = load_yaml(config_folder() / "evals" / "routing.yaml")["routing"]
    found, problems = parse(RoutingConfig, {**tree, "thresholds": {**tree["thresholds"], **thresholds}})
    assert found is not None, problems
    return found


def model(sharpened: float = 1.0, **moe: Any) -> ViT:
    """The small model in float64, its routers' parameters moved and their scale raised."""
    values = {"blocks": "last 2", "num_experts": 4, "slots_per_expert": 3, "expert_init": "independent", **moe}
    one = build_model(model_config(moe=moe_config(**values)), torch.float64).to_empty(device="cpu")
    initialize(one, 3)
    perturb(one)
    for name, p in one.named_parameters():
        if name.endswith("scale"):
            p.data *= sharpened
    return one.double()


def measured(one: ViT, asked: RoutingConfig, batches: list[Batch], step: int = 7) -> dict[str, Any]:
    state: Any = SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu"), module=one), step=step)
    return dict(RoutingEvaluator(asked, batches, [1, 2], main=True).run(state))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "sum_over_world", lambda sums: sums)


def inputs_of(one: ViT, batches: list[Batch], block: int) -> Iterator[np.ndarray]:
    """The tokens that a block's router was given, "G T D", by batch."""
    given: list[np.ndarray] = []
    handle = one.get_submodule(f"blocks.{block}.moe.router").register_forward_pre_hook(
        lambda _, args: given.append(args[0].detach().numpy())
    )
    with torch.no_grad():
        for batch in batches:
            one(batch.images)
    handle.remove()
    yield from given


# Sharpened so far that every threshold cuts through the slots and tokens of at least one of them.
@pytest.mark.parametrize("sharpened", [1.0, 12.0])
def test_soft_measures_are_those_of_a_direct_computation(sharpened: float) -> None:
    cut = {"near_uniform": 0.9, "one_hot": 0.8, "duplicate": 0.7, "dead": 0.9}
    one, batches = model(sharpened), global_batch().split(2)
    found = measured(one, config(**cut), batches)
    for block in (1, 2):
        router = one.get_submodule(f"blocks.{block}.moe.router")
        phi, scale = router.phi.detach().flatten(1).numpy(), router.scale.item()
        parts = [direct.weightings(x, phi, scale) for x in inputs_of(one, batches, block)]
        dispatch, combine = (np.concatenate(both) for both in zip(*parts, strict=True))
        expected = direct.soft_measures(dispatch, combine, 4, cut) | direct.parameter_measures(phi, "phi", 4)
        expected["scale"] = scale
        of_block = {name.partition("/")[2]: v for name, v in found.items() if name.startswith(f"{block}/")}
        assert of_block == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert of_block["token_coverage"] == pytest.approx(12 / 16, rel=1e-12)  # slots / tokens
        if block == 2 and sharpened > 1:
            cuts = ("one_hot_slots", "one_hot_tokens", "duplicate_slots", "dead_slots", "high_coverage", "low_coverage")
            assert all(0 < expected[name] < 1 for name in cuts), expected


def served(gates: np.ndarray, K: int | None, S: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each token of a group is served and how often each expert is asked, by sorting and counting."""
    T, E = gates.shape
    times, asked = np.zeros(T), np.zeros(E)
    if K is None:
        for e in range(E):
            for t in sorted(range(T), key=lambda t: -gates[t, e])[:S]:
                times[t] += 1
                asked[e] += 1
        return times, asked
    room = dict.fromkeys(range(E), S)
    for choice in range(K):
        for t in range(T):
            e = sorted(range(E), key=lambda e: -gates[t, e])[choice]
            asked[e] += 1
            if room[e]:
                room[e], times[t] = room[e] - 1, times[t] + 1
    return times, asked


@pytest.mark.parametrize(("router", "K"), [("tokens_choice", 2), ("experts_choice", None)])
def test_sparse_measures_are_those_of_a_direct_computation(router: str, K: int | None) -> None:
    sparse = {"group_images": 2, "capacity_factor": 0.5, "capacity_rounding": "nearest"}
    choice = {"top_k": 2, "batch_priority": False}
    one, batches = model(router=router, sparse=sparse, tokens_choice=choice), global_batch().split(2)
    found = measured(one, config(), batches)
    for block in (1, 2):
        gate = one.get_submodule(f"blocks.{block}.moe.router").gate.detach().numpy()
        S = round(32 * 0.5 / 4) * (K or 1)
        times, asked = [], np.zeros(4)
        for x in inputs_of(one, batches, block):
            for group in x:
                e = np.exp(group @ gate)
                of_group, more = served(e / e.sum(1, keepdims=True), K, S)
                times += of_group.tolist()
                asked += more
        load = asked / asked.sum()
        assert found[f"{block}/unserved_tokens"] == pytest.approx(np.mean([t == 0 for t in times]))
        assert found[f"{block}/experts_per_token"] == pytest.approx(np.mean(times))
        assert found[f"{block}/load_spread"] == pytest.approx(load.max() / load.mean())
        assert found[f"{block}/load_entropy"] == pytest.approx(direct.entropy(load) / math.log(4))
        assert found[f"{block}/gate_norm_max"] == pytest.approx(np.linalg.norm(gate, axis=0).max())


def test_slots_of_exactly_uniform_weights_are_no_duplicates_and_a_router_without_parameters_raises_no_alarm() -> None:
    uniform = measured(model(soft={"dispatch": "uniform"}), config(), global_batch().split(2))
    assert uniform["1/duplicate_slots"] == uniform["1/slot_similarity"] == 0
    identity = measured(
        model(router="identity", num_experts=8, slots_per_expert=2), config(), [global_batch()], step=99
    )
    assert identity["1/one_hot_slots"] == identity["1/one_hot_tokens"] == 1
    assert not any(isinstance(value, Alarm) for value in identity.values())
