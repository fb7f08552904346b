"""This file owns which source a configuration names, and what is wrong with it before a picture is looked at."""

import os
from typing import Any

from softmoe_train.shards import manifest, parquet
from softmoe_train.shards.archives import Archive, ArchiveSource, members_of, read_labels
from softmoe_train.shards.folder import FolderSource
from softmoe_train.shards.manifest import ManifestSource
from softmoe_train.shards.parquet import ParquetSource, parquet_problem
from softmoe_train.shards.settings import MakeSettings, StoppedError
from softmoe_train.shards.source import LeftOut, Source, suffix_problem
from softmoe_train.shards.table import Columns, choose_columns


def build_source(settings: MakeSettings) -> Source[Any]:
    """The source that `settings` name; raises ValueError with every mistake, a line each, that its files show at once."""
    assert settings.from_ is not None
    try:
        match settings.source:
            case "folder":
                source = FolderSource(settings.from_)
                if not source.class_names():
                    raise ValueError(
                        f"from={settings.from_} holds no folder: pictures lie in a folder for each class, CLASS/FILE"
                    )
                return source
            case "archives":
                return ArchiveSource(settings.files(), _labels(settings))
            case "manifest":
                columns = _columns(settings, manifest.columns_of(settings.from_), "path", settings.from_)
                return ManifestSource(settings.from_, settings.root or os.path.dirname(settings.from_) or ".", columns)
            case "parquet":
                problem = parquet_problem()
                if problem is not None:
                    raise ValueError(problem)
                paths = settings.files()
                return ParquetSource(paths, _columns(settings, parquet.columns_of(paths[0]), "image", paths[0]))
    except StoppedError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        raise ValueError(f"from={settings.from_} cannot be read: {error}") from None


def read_classes(path: str | None) -> list[str] | None:
    """The class names of a file, a line each; raises ValueError where one is twice."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError:
        raise ValueError(f"classes={path} is not UTF-8; give a text file with a class name on each line") from None
    twice = (
        next((name for name in names if not name or names.count(name) > 1), None)
        if len(set(names)) < len(names) or "" in names
        else None
    )
    if twice is not None:
        raise ValueError(
            f"classes={path} has the name {twice!r} twice, or an empty line: a line's number is its label; correct it"
        )
    return names


def _columns(settings: MakeSettings, there: list[str], image: str, what: str) -> Columns:
    keys = ("image_column", "label_column", "text_column", "key_column")
    columns, problems = choose_columns(
        {key: getattr(settings, key) for key in keys}, settings.extra, there, image, what
    )
    if columns is None:
        raise ValueError("\n".join(problems))
    return columns


def _labels(settings: MakeSettings) -> dict[str, str] | None:
    if settings.labels is None:
        return None
    names = []
    for path in settings.files():
        with open(path, "rb") as file:
            found = members_of(file, Archive(path, 0, os.path.getsize(path), None))
            names += [
                os.path.basename(one.name).partition(".")[0]
                for one in found
                if not isinstance(one, LeftOut) and suffix_problem(one.name) is None
            ]
    return read_labels(settings.labels, settings.synsets, names)
