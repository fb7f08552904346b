"""The product's own proof of every ablation, two processes against one, over the engines and both expert axes."""

import pytest

from tests.ranks.test_matrix import Case, check, proofs

SOFT = "model.moe.expert_init=independent model.moe.soft."
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
}


@pytest.mark.parametrize("name", CASES)
def test_the_layout_computes_what_one_process_does(name: str) -> None:
    check(CASES[name], proofs(tuple(CASES.values()))[CASES[name]])
