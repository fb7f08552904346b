"""This file owns a report from its runs to its files: read, compare, draw, write."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import softmoe_train
from softmoe_train.observe.judged import NUMBERS, better
from softmoe_train.plain import plain
from softmoe_train.report import sections
from softmoe_train.report.draw import looks
from softmoe_train.report.find import find_runs
from softmoe_train.report.page import Page, html_of
from softmoe_train.report.read import RunRead, read_run
from softmoe_train.report.rows import Row, Spread, rows_of, spread_of


@dataclass(frozen=True)
class Report:
    """What was read of some folders."""

    title: str
    rows: list[Row]
    left_out: dict[Path, str]

    @property
    def runs(self) -> list[RunRead]:
        """All that were read."""
        return [run for row in self.rows for run in row.runs]


def read_report(named: Sequence[Path], progress: Callable[[int, int], object]) -> Report:
    """Read all runs in and below the named folders; `progress` hears how many of how many have been read."""
    folders, left_out = find_runs(named)
    common = _common(folders)
    runs = []
    for count, folder in enumerate(folders, start=1):
        runs.append(
            read_run(folder, folder.relative_to(common).as_posix() if folder != common else folder.resolve().name)
        )
        progress(count, len(folders))
    where = plain(common.resolve().name or "/") if len(runs) != 1 else plain(runs[0].name)
    return Report(where, rows_of(runs), left_out)


def page_of(report: Report) -> Page:
    """The page of a report."""
    rows, look = report.rows, looks(len(report.rows))
    count = f"{len(report.runs)} run{'' if len(report.runs) == 1 else 's'}"
    kinds = "" if len(rows) == len(report.runs) else f" of {len(rows)} kind{'' if len(rows) == 1 else 's'}"
    running = sum(run.state == "running" for run in report.runs)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sentence = f"{count}{kinds}" + (f", {running} of them running" if running else "")
    found = [
        sections.results(rows, look),
        sections.grids(rows),
        sections.pareto(rows, look),
        sections.curves(rows, look),
        sections.best_values(rows),
        sections.pictures(rows),
        sections.settings(rows),
        sections.states(rows, report.left_out),
    ]
    return Page(
        title=f"{report.title}: {count} compared" if len(report.runs) > 1 else f"Run {report.title}",
        sentence=f"{sentence}. Made by softmoe report {softmoe_train.__version__} on {made}.",
        sections=[section for section in found if section is not None],
    )


def write_report(report: Report, out: Path) -> None:
    """Write the page; it appears when it is whole."""
    draft = out.with_name(f"{out.name}.part")
    draft.write_text(html_of(page_of(report)), encoding="utf-8")
    os.replace(draft, out)


def document(report: Report) -> dict[str, Any]:
    """The same for programs, as JSON."""

    def spread(value: Spread | None) -> dict[str, float | None] | None:
        return None if value is None else value._asdict()

    def row_of(row: Row) -> dict[str, Any]:
        metrics = sorted({name for run in row.counted for name in run.curves})
        return {
            "label": row.label,
            "settings": row.settings,
            "runs": list(_runs_of(row)),
            "numbers": {number.source: spread(sections.last_of(row, number)) for number in NUMBERS},
            "costs": {name: spread(row.cost(name)) for name in row.costs[0]._fields},
            "last": {name: spread(row.spread(lambda run, name=name: run.last(name))) for name in metrics},
            "best": {name: spread(_best(row, name, way)) for name in metrics if (way := better(name)) is not None},
        }

    return {
        "rows": [row_of(row) for row in report.rows],
        "left_out": {str(path): why for path, why in report.left_out.items()},
    }


def _runs_of(row: Row) -> Iterator[dict[str, Any]]:
    for run in row.runs:
        yield {
            "folder": str(run.folder),
            "state": run.state,
            "reason": run.reason,
            "step": run.step,
            "images_seen": run.images_seen,
            "seed": run.config.get("seed"),
            "counted": run in row.counted,
            "notes": run.notes,
        }


def _best(row: Row, name: str, way: str) -> Spread | None:
    return spread_of(run.curves[name].best(way)[0] for run in row.counted if name in run.curves)


def _common(folders: list[Path]) -> Path:
    if not folders:
        return Path()
    if len(folders) == 1:
        return folders[0]
    absolute = all(folder.is_absolute() for folder in folders)
    return Path(os.path.commonpath(folders)) if absolute or not any(f.is_absolute() for f in folders) else Path()
