"""This file owns the keys of `softmoe report`."""

import importlib.util
from typing import Annotated

from pydantic import AfterValidator, field_validator

from softmoe_train.config import JsonOut, Record, out_problems


def _html(path: str) -> str:
    problems = out_problems("out", path, ".html")
    if problems:
        raise ValueError(problems[0])
    return path


class ReportConfig(Record):
    """Which runs, and where the report goes."""

    runs: list[str]  # run folders, or folders that hold some
    out: Annotated[str, AfterValidator(_html)]
    json_out: JsonOut

    @field_validator("runs")
    @classmethod
    def _some(cls, runs: list[str]) -> list[str]:
        if not runs:
            raise ValueError("runs=[]: no run is named; use `softmoe report runs/*`, or the folder of a sweep")
        return runs


def report_problems() -> list[str]:
    """Why no report can be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        return [
            'softmoe report draws with matplotlib, which is not installed; use pip install "softmoe-train[pictures]"'
        ]
    return []
