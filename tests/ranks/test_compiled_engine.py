"""Compiled blocks under every way of sharding give the gradients of the float64 model. Minutes each: the compiler is slow on a CPU."""

import pytest

from tests.ranks.launch import run_ranks
from tests.ranks.test_layouts import TOLERANCE, Layout, one_step, options, relative, truth

COMPILED = {"compiled": True}
CASES = [
    Layout(1, 1, "fsdp", options=options(**COMPILED)),
    Layout(2, 2, "replicated", 2, options=options(**COMPILED)),
    Layout(2, 2, "replicated", options=options(**COMPILED, recompute="moe")),
    Layout(2, 2, "fsdp", options=options(**COMPILED, recompute="block")),
    Layout(4, 2, "fsdp", options=options(**COMPILED, recompute="block")),  # experts are a unit of their own
    Layout(4, 2, "hsdp", options=options(**COMPILED, shard_size=2, exchange_chunks=2)),
]


@pytest.mark.full
@pytest.mark.parametrize("layout", CASES, ids=str)
def test_compiled_blocks_have_the_same_gradients(layout: Layout) -> None:
    got = run_ranks(one_step, layout.world, layout, timeout=900)[0]["gradients"]
    errors = {name: relative(got[name], want) for name, want in truth(num_experts=8)["gradients"].items()}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
