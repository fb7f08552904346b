"""The product's own proof of both sparse routers, over expert axes, engines, micro-batches and routing groups."""

import pytest

from tests.ranks.test_matrix import KINDS, Case, check, proofs

LOSSES = " ".join(f"model.moe.tokens_choice.{name}_loss=0.1" for name in ("importance", "load", "gshard"))
# Noise, Batch Priority Routing, every auxiliary loss; tokens are dropped and slots left empty.
TOKENS = (
    f"model.moe.router=tokens_choice model.moe.tokens_choice.top_k=2 model.moe.sparse.capacity_factor=0.75 {LOSSES}"
)
EXPERTS = "model.patch_size=2 model.moe.router=experts_choice model.moe.sparse.capacity_factor=0.5"
PAIRS, FOURS = " model.moe.sparse.group_images=2", " model.moe.sparse.group_images=4"

CASES = [
    Case(4, 1, "fsdp", "float32", 1, "none", TOKENS + PAIRS),
    Case(4, 2, "hsdp", "float32", 2, "none", EXPERTS + PAIRS + " model.moe.expert_dropout=0.25"),
    Case(4, 4, "replicated", "float32", 1, "block", EXPERTS),
    Case(4, 4, "fsdp", "float32", 2, "none", TOKENS + PAIRS),
    Case(2, 1, "zero 1", "float32", 2, "none", EXPERTS + FOURS),
    Case(2, 2, "fsdp", "float32", 4, "block", TOKENS + PAIRS + " parallel.exchange_chunks=1"),
    Case(2, 2, "replicated", "float32", 1, "none", TOKENS + FOURS + " parallel.exchange_chunks=2"),
    Case(2, 2, "zero 2", "bfloat16", 1, "moe", TOKENS),
    Case(2, 1, "fsdp", "bfloat16", 1, "none", EXPERTS + PAIRS),
]
# The load loss is steep where noise is small beside bf16's rounding of tokens: in bf16 a proof sees it on any layout.
IN_BF16 = " model.moe.tokens_choice.load_loss=0.0"
REST = [
    Case(
        ranks,
        axis,
        kind,
        precision,
        micro_batches,
        "none",
        router + group + (IN_BF16 if precision == "bfloat16" else ""),
    )
    for ranks in (1, 2, 4)
    for axis in (1, 2, 4)
    for kind in KINDS
    for precision in ("float32", "bfloat16")
    for micro_batches in (1, 2)
    for router in (TOKENS, EXPERTS)
    for group in ("", PAIRS)
    if axis <= ranks and (kind != "hsdp" or ranks == 4)
]


def together(case: Case, cases: list[Case]) -> tuple[Case, ...]:
    """One start of the ranks for all cases of as many, 20 at most."""
    alike = [other for other in cases if other.ranks == case.ranks]
    first = alike.index(case) // 20 * 20
    return tuple(alike[first : first + 20])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks}-{case.axis}-{case.kind}-{case.precision}")
def test_the_layout_computes_what_one_process_does(case: Case) -> None:
    rows = proofs(together(case, CASES))[case]
    assert {"decisions", "update 2: decisions"} <= {row.what for row in rows}
    check(case, rows)


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=str)
def test_every_other_layout_does_too(case: Case) -> None:
    check(case, proofs(together(case, REST))[case])
