"""The paper's Table 9 as it was copied: every row is there, and its numbers go together."""

from collections import Counter

from tests.pareto import pareto_rows

ROWS = pareto_rows()
BY_NUMBER = {row.row: row for row in ROWS}


def test_all_107_rows_are_there_by_kind_and_backbone() -> None:
    assert [row.row for row in ROWS] == list(range(1, 108))
    assert Counter(row.kind for row in ROWS) == {"dense": 8, "soft": 18, "ec": 43, "tc": 38}
    assert Counter(f"{row.size}{row.patch}" for row in ROWS) == {
        "s32": 15, "s16": 20, "s8": 9, "b32": 15, "b16": 18, "l32": 15, "l16": 11, "h14": 4,
    }  # fmt: skip


def test_rows_hold_what_the_paper_prints() -> None:
    dense, soft, choosing, chosen = (BY_NUMBER[n] for n in (1, 81, 103, 107))
    assert dense[1:9] == ("dense", "s", 32, None, None, None, None, None)
    assert dense[9:] == (42.8, 51.0, 4.2, 6.3)
    assert soft[1:] == ("soft", "s", 8, 512, None, None, 1, 784, 56.1, 78.0, 85.6, 88.5)
    assert choosing[1:] == ("ec", "h", 14, 64, None, 1.25, 8, 2048, 57.3, 80.4, 855.9, 210.9)
    assert chosen[1:] == ("tc", "s", 8, 32, 2, 2.0, 8, 6272, 54.1, 74.8, 424.4, 255.4)


def test_each_kind_has_the_settings_of_its_kind() -> None:
    for row in ROWS:
        images = (224 // row.patch) ** 2
        assert (row.experts is None) == (row.group_images is None) == (row.kind == "dense"), row
        assert (row.top_k is None) == (row.kind != "tc"), row
        assert (row.capacity_factor is None) == (row.kind in ("dense", "soft")), row
        assert row.group_images in {"dense": (None,), "soft": (1,), "tc": (8,), "ec": (1, 8)}[row.kind], row
        assert row.group_images is None or row.group_tokens == row.group_images * images, row


def test_the_table_is_in_the_order_of_its_cost() -> None:
    days = [row.tpuv3_days for row in ROWS]
    assert days == sorted(days)
