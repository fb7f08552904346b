"""The product's own proof of every ablation, two processes against one, over the engines and both expert axes."""

import pytest

from tests.ranks.test_matrix import KINDS, Case, batch_of, check, proofs

SOFT = "model.moe.expert_init=independent model.moe.soft."
GATED = "model.moe.expert=gated_mlp"
CASES = {
    "soft / uniform": Case(2, 2, "replicated", "float32", 1, "none", f"{SOFT}combine=uniform"),
    "uniform / soft": Case(2, 1, "fsdp", "float32", 1, "none", f"{SOFT}dispatch=uniform"),
    "uniform": Case(2, 2, "fsdp", "float32", 1, "block", f"{SOFT}dispatch=uniform model.moe.soft.combine=uniform"),
    "uniform under zero": Case(
        2, 1, "zero 1", "float32", 1, "none", f"{SOFT}dispatch=uniform model.moe.soft.combine=uniform"
    ),
    "identity": Case(2, 2, "zero 1", "float32", 1, "none", "model.moe.router=identity model.moe.slots_per_expert=1"),
    "identity, sharded": Case(
        2, 2, "fsdp", "bfloat16", 1, "moe", "model.moe.router=identity model.moe.slots_per_expert=1"
    ),
    "separate": Case(2, 2, "fsdp", "float32", 2, "none", f"optim=adafactor {SOFT}combine=separate"),
    "not normalised": Case(2, 1, "replicated", "float32", 1, "none", f"{SOFT}normalize=false"),
    "gated": Case(2, 2, "fsdp", "float32", 1, "none", GATED),
    # One expert on two ranks: cut along its hidden layer, of 42 values.
    "gated, cut inside": Case(2, 1, "fsdp", "float32", 1, "none", f"{GATED} model.moe.num_experts=1"),
    "gated, dropped": Case(2, 2, "zero 2", "float32", 1, "none", f"{GATED} model.moe.expert_dropout=0.3"),
    "dropped": Case(2, 2, "fsdp", "float32", 2, "block", "model.moe.expert_dropout=0.3 parallel.exchange_chunks=2"),
    "dropped in groups of two images": Case(
        2,
        2,
        "replicated",
        "float32",
        2,
        "none",
        f"model.moe.router=tokens_choice model.moe.sparse.group_images=2 {GATED} model.moe.expert_dropout=0.3",
    ),
    "dropped, no axis": Case(2, 1, "replicated", "bfloat16", 1, "moe", "model.moe.expert_dropout=0.3"),
}
FOUR = "optim=adafactor model.moe.expert_dropout=0.3"
REST = [
    # Two gated experts on four ranks: cut along their hidden layer.
    Case(4, 1, "fsdp", "float32", 1, "none", f"{FOUR} {GATED} model.moe.num_experts=2"),
    Case(
        4,
        4,
        "fsdp",
        "float32",
        2,
        "block",
        f"{FOUR} parallel.exchange=two_stage parallel.node_size=2 parallel.exchange_chunks=2",
    ),
    Case(4, 2, "hsdp", "bfloat16", 1, "none", f"{FOUR} {SOFT}combine=separate"),
    *(
        Case(4 if kind == "hsdp" else 2, axis, kind, "float32", 1, "none", case.more)
        for case in {case.more: case for case in CASES.values()}.values()
        for kind in KINDS
        for axis in (1, 2)
        if "num_experts=1" not in case.more and ("adafactor" not in case.more or "zero" not in kind)
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_the_layout_computes_what_one_process_does(name: str) -> None:
    check(CASES[name], proofs(tuple(CASES.values()))[CASES[name]])


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=str)
def test_every_other_layout_does_too(case: Case) -> None:
    check(case, proofs(batch_of(case, REST))[case])
