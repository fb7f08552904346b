"""The formula of the exchange's bytes, at the sizes that no test can run."""

from typing import Any

from softmoe_train.parallel.traffic import ExchangeTraffic, exchange_traffic
from tests.ranks.small import parallel_config


def of_h14_on_256_gpus(**changes: Any) -> ExchangeTraffic:
    """H/14, 128 experts of one slot in bf16, batch 4,096, expert axis 128, 8 ranks on a node."""
    return exchange_traffic(
        parallel_config(128, **changes), axis=128, on_node=8, images=16, micro_batches=1, num_experts=128,
        slots_per_expert=1, width=1280, itemsize=2, expert_dropout=0.0,
    )  # fmt: skip


def test_a_wide_axis_exchanges_a_third_of_a_gigabyte_in_messages_of_41_kilobytes() -> None:
    flat = of_h14_on_256_gpus()
    assert 16 * flat.handed_bytes == 335_544_320, "16 layers"
    assert flat.message_bytes == 40_960
    assert flat.off_rank_bytes == flat.handed_bytes * 127 // 128
    assert flat.off_node_bytes == flat.handed_bytes * 120 // 128


def test_two_stages_send_the_same_between_nodes_in_messages_eight_times_as_long() -> None:
    flat, staged = of_h14_on_256_gpus(), of_h14_on_256_gpus(exchange="two_stage", exchange_chunks=4)
    assert staged.off_node_bytes == flat.off_node_bytes
    assert staged.handed_bytes == 2 * flat.handed_bytes
    assert staged.message_bytes * 4 == 8 * flat.message_bytes, "in four chunks"
    assert staged.collectives == 4 * 2 * 4
