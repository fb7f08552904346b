"""This file owns the keys of `softmoe shards make` and the rules that they keep, and the error of a making that has to stop."""

import glob
import importlib.util
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from softmoe_train.config import ConfigError, JsonOut, Record, config_folder, load_yaml, out_problems, parse
from softmoe_train.data.places import expand_shards, is_url
from softmoe_train.observe.console import ProgressKind
from softmoe_train.redact import without_secrets

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
SourceKind = Literal["folder", "archives", "manifest", "parquet"]

# What only some sources read.
ONLY_FOR: dict[str, tuple[SourceKind, ...]] = {
    "root": ("manifest",),
    "labels": ("archives",),
    "synsets": ("archives",),
    "image_column": ("manifest", "parquet"),
    "label_column": ("manifest", "parquet"),
    "text_column": ("manifest", "parquet"),
    "key_column": ("manifest", "parquet"),
    "extra": ("manifest", "parquet"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class StoppedError(Exception):
    """Why a making, check or indexing under way had to stop: one message for its user."""


class Making(Record):
    """How shards are made, whatever the source."""

    out: str | None
    name: str
    held_out: str
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None
    test_count: Positive | None
    test_every: Annotated[int, Field(ge=2)] | None
    samples_per_shard: Positive | None
    shards: Positive | None
    shard_mib: Annotated[float, Field(gt=0)] | None
    seed: Count | None
    resize: Positive | None
    resize_side: Literal["short", "long"]
    quality: Annotated[int, Field(ge=1, le=100)]
    verify: bool
    max_pixels: Positive
    max_broken: Count
    processes: Positive | None
    progress: ProgressKind

    def problems(self) -> list[str]:
        """Every mistake in the combination of these keys, as a full message."""
        problems = []
        if self.out is None:
            problems.append("out is not set; name the folder for the shards, as in out=shards/mine")
        elif os.path.exists(self.out) and not os.path.isdir(self.out):
            problems.append(f"out={self.out} is not a folder; name another")
        problems += [
            f"{key}={getattr(self, key)!r} is no beginning of a file name; use letters, digits, - and _"
            for key in ("name", "held_out")
            if not _NAME.fullmatch(getattr(self, key))
        ]
        if self.name == self.held_out:
            problems.append(
                f"name={self.name} and held_out={self.held_out} are the same: shards would overwrite each other; change one"
            )
        sizes = [key for key in ("samples_per_shard", "shards", "shard_mib") if getattr(self, key) is not None]
        if len(sizes) != 1:
            given = (
                ", ".join(f"{key}={getattr(self, key)}" for key in sizes)
                or "none of samples_per_shard, shards and shard_mib"
            )
            problems.append(f"{given}: exactly one says how large shards are; give one")
        tests = [key for key in ("test_fraction", "test_count", "test_every") if getattr(self, key) is not None]
        if len(tests) > 1:
            given = ", ".join(f"{key}={getattr(self, key)}" for key in tests)
            problems.append(f"{given}: each says how much is held out; give one")
        return problems


def making(**changes: Any) -> Making:
    """The values of conf/shards_make.yaml with `changes`, for a program that has a source of its own; raises ValueError."""
    values = {
        key: value
        for key, value in load_yaml(config_folder() / "shards_make.yaml").items()
        if key in Making.model_fields
    }
    settings, problems = parse(Making, {**values, **changes})
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


class MakeSettings(Making):
    """Keys of `softmoe shards make`."""

    source: SourceKind
    from_: str | None = Field(alias="from")
    classes: str | None
    root: str | None
    labels: str | None
    synsets: str | None
    image_column: str | None
    label_column: str | None
    text_column: str | None
    key_column: str | None
    extra: list[str]

    def problems(self) -> list[str]:
        """Every mistake in the combination of these keys, those about the source too."""
        problems = super().problems()
        for key, sources in ONLY_FOR.items():
            if getattr(self, key) and self.source not in sources:
                problems.append(f"{key}={getattr(self, key)} does nothing with source={self.source}; leave it out")
        if self.synsets is not None and self.labels is None:
            problems.append(
                f"synsets={self.synsets} says what the numbers of labels= mean; give labels=FILE, or leave it out"
            )
        for key in ("classes", "labels", "synsets"):
            path = getattr(self, key)
            if path is not None and not os.path.isfile(path):
                problems.append(f"{key}={path} is not a file; correct the path (relative ones start at {os.getcwd()})")
        if self.root is not None and not os.path.isdir(self.root):
            problems.append(
                f"root={self.root} is not a folder; correct the path (relative ones start at {os.getcwd()})"
            )
        return problems + _from_problems(self.source, self.from_)

    def files(self) -> list[str]:
        """The archives or parquet files that `from` names, in a fixed order."""
        assert self.from_ is not None
        return _files(self.source, self.from_)


def _from_problems(source: SourceKind, given: str | None) -> list[str]:
    if given is None:
        return [
            "from is not set; name the folder, archive, manifest or parquet file with the pictures, as in from=pictures"
        ]
    start = f"correct the path (relative ones start at {os.getcwd()})"
    match source:
        case "folder":
            return [] if os.path.isdir(given) else [f"from={given} is not a folder of pictures; {start}"]
        case "manifest":
            problems = [] if os.path.isfile(given) else [f"from={given} is not a file; {start}"]
            if not given.endswith((".csv", ".tsv", ".jsonl")):
                problems.append(f"from={given} is no manifest that we know by its name; end it in .csv, .tsv or .jsonl")
            return problems
        case "archives" | "parquet":
            found = _files(source, given)
            missing = [path for path in found if not os.path.isfile(path)]
            suffix = ".tar" if source == "archives" else ".parquet"
            if not found or missing:
                return [f"from={given} names no {suffix} file; {start}"]
            return []


def _files(source: SourceKind, given: str) -> list[str]:
    suffix = ".tar" if source == "archives" else ".parquet"
    if os.path.isdir(given):
        return sorted(glob.glob(os.path.join(glob.escape(given), f"*{suffix}")), key=os.fsencode)
    if glob.has_magic(given) and not os.path.exists(given):
        return sorted(glob.glob(given), key=os.fsencode)
    return [given]


class CheckSettings(Record):
    """Keys of `softmoe shards check` beside those of a run."""

    ranks: Positive | None
    out: JsonOut
    picture: str | None
    quarantine: str | None
    processes: Positive | None
    progress: ProgressKind

    def problems(self) -> list[str]:
        """Why a file could not be written."""
        problems = out_problems("picture", self.picture, ".png") + out_problems("quarantine", self.quarantine, ".jsonl")
        if self.picture is not None and importlib.util.find_spec("matplotlib") is None:
            problems.append(
                f'picture={self.picture} needs matplotlib, which is not installed; pip install "softmoe-train[pictures]"'
            )
        return problems


class IndexSettings(Record):
    """Keys of `softmoe shards index`."""

    data: str | list[str] | None
    out: str | None
    verify: bool
    processes: Positive | None
    progress: ProgressKind

    def problems(self) -> list[str]:
        """Every mistake that shows before a tar is read."""
        try:
            local_shards(self.data, key="data")
        except ValueError as error:
            return [str(error)]
        if self.out is not None and not os.path.isdir(self.out):
            return [f"out={self.out} is not a folder; make it, or leave out= out to have the index beside the tars"]
        return []


def local_shards(spec: str | list[str] | None, *, key: str) -> list[str]:
    """The tars that `spec` names on disks here; raises ValueError where there is none, or one at a URL."""
    paths = expand_shards(spec, key=key)
    remote = next((path for path in paths if is_url(path)), None)
    if remote is not None:
        raise ValueError(
            f"{key}: {without_secrets(remote)} is at a URL, and every byte of it is read here: copy or mount the shards"
        )
    return paths
