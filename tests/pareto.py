"""This file owns the paper's Table 9 as tests read it: golden/pareto.csv, all 107 models of its Pareto section (paper.md 3.8).

The table prints a group in tokens; `group_images` is that, divided by the tokens of an image of 224 pixels.
"""

import csv
from pathlib import Path
from typing import Literal, NamedTuple, cast

GOLDEN = Path(__file__).parent / "golden" / "pareto.csv"


class ParetoRow(NamedTuple):
    """One trained model: what it was, what it reached, what it cost. None where the table has a dash."""

    row: int
    kind: Literal["dense", "soft", "tc", "ec"]
    size: str  # s, b, l or h
    patch: int  # pixels
    experts: int | None
    top_k: int | None
    capacity_factor: float | None
    group_images: int | None
    group_tokens: int | None
    jft_precision: float  # %, at 1
    imagenet_10shot: float  # %
    train_exaflop: float  # one a multiply-and-add (paper.md 2.2)
    tpuv3_days: float

    @property
    def name(self) -> str:
        """What `model=` calls it."""
        backbone = f"{self.size}{self.patch}"
        return f"vit_{backbone}" if self.kind == "dense" else f"{self.kind}_{backbone}_{self.experts}e"

    @property
    def overrides(self) -> list[str]:
        """`model=` and what the name leaves open."""
        open_values = {
            "tokens_choice.top_k": self.top_k,
            "sparse.capacity_factor": self.capacity_factor,
            "sparse.group_images": self.group_images if self.kind in ("tc", "ec") else None,
        }
        return [f"model={self.name}", *(f"model.moe.{key}={v}" for key, v in open_values.items() if v is not None)]


def pareto_rows() -> list[ParetoRow]:
    """All rows, in the order of the table."""
    with GOLDEN.open(newline="") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> ParetoRow:
    def whole(name: str) -> int | None:
        return int(cells[name]) if cells[name] else None

    return ParetoRow(
        row=int(cells["row"]),
        kind=cast(Literal["dense", "soft", "tc", "ec"], cells["kind"]),
        size=cells["size"],
        patch=int(cells["patch_pixels"]),
        experts=whole("experts"),
        top_k=whole("top_k"),
        capacity_factor=float(cells["capacity_factor"]) if cells["capacity_factor"] else None,
        group_images=whole("group_images"),
        group_tokens=whole("group_tokens"),
        jft_precision=float(cells["jft_precision_at_1_percent"]),
        imagenet_10shot=float(cells["imagenet_10shot_percent"]),
        train_exaflop=float(cells["train_exaflop"]),
        tpuv3_days=float(cells["tpuv3_days"]),
    )
