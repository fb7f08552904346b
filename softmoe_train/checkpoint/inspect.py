"""This file owns what a checkpoint tells of itself: its JSON read once, sizes by kind and by file, and a document for programs."""

import math
from typing import Annotated, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.difference import Difference, difference
from softmoe_train.checkpoint.folder import checkpoint_at
from softmoe_train.checkpoint.manifest import DTYPES, JSON, Manifest, Mark, StoredTensor, read_manifest, read_mark
from softmoe_train.checkpoint.remote import Place, place_of, place_problem
from softmoe_train.checkpoint.store import read_documents
from softmoe_train.checkpoint.verify import verify
from softmoe_train.config import JsonOut, Record
from softmoe_train.redact import without_secrets
from softmoe_train.stores import driver_problem

KINDS = ("model", "optimizer", "average")


class OfCheckpoint(Record):
    """What every verb that reads one checkpoint is told."""

    ckpt: str | None  # a run folder (its newest checkpoint) or a step folder, or a URL of one

    @field_validator("ckpt")
    @classmethod
    def _given(cls, ckpt: str | None) -> str:
        if ckpt is None:
            raise ValueError("ckpt is not set; give a run folder or a step folder, as in ckpt=runs/mine")
        return found("ckpt", ckpt)

    @property
    def path(self) -> Place:
        """The step folder."""
        assert self.ckpt is not None
        return checkpoint_at(place_of(self.ckpt))


class InspectConfig(OfCheckpoint):
    """Keys of `softmoe inspect`."""

    verify: bool  # read every byte and compare its hash
    against: str | None  # another run or step folder, or a URL of one
    routing: bool  # look at the routers over pictures, and draw what they do
    images: str | list[str] | None  # shards of those pictures; null: the run's data.test
    count: Annotated[int, Field(ge=1)]  # how many of them, the first
    pictures: Annotated[str, Field(min_length=1)]  # the folder for PNG files
    out: JsonOut

    @field_validator("against")
    @classmethod
    def _there(cls, against: str | None) -> str | None:
        return against if against is None else found("against", against)

    @model_validator(mode="after")
    def _images_are_for_routing(self) -> Self:
        if self.images is not None and not self.routing:
            raise ValueError(f"images={self.images} is for routing=true; add it, or leave images out")
        return self


def found(key: str, folder: str) -> str:
    """The folder or URL as given; raises ValueError that names `key` where it holds no complete checkpoint."""
    problem = place_problem(folder) or driver_problem(folder)
    if problem is not None:
        raise ValueError(f"{key}={without_secrets(folder)}: {problem}")
    try:
        checkpoint_at(place_of(folder))
    except CheckpointError as error:
        raise ValueError(f"{key}={folder}: {error.problems[0]}") from None
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be read: {error}") from None
    return folder


class Total(NamedTuple):
    """Tensors of one kind, and how many bytes of them are experts."""

    tensors: int
    elements: int
    expert_bytes: int
    other_bytes: int


class Held(NamedTuple):
    """What one file holds; `experts` are runs [first, one past the last] of expert numbers, in whatever layers."""

    bytes: int
    tensors: int
    experts: list[tuple[int, int]]


class Contents(NamedTuple):
    """All the JSON of a checkpoint, checked against its mark."""

    path: Place
    mark: Mark
    manifest: Manifest
    documents: dict[str, JSON]

    @property
    def loop(self) -> dict[str, JSON]:
        """The loop state, or nothing where there is none."""
        loop = self.documents.get("loop")
        return loop if isinstance(loop, dict) else {}

    @property
    def config(self) -> dict[str, JSON]:
        """The settings that it was saved with, or nothing."""
        config = self.documents.get("config")
        return config if isinstance(config, dict) else {}


class Inspection(NamedTuple):
    """What was found; `faults` is None where nobody asked to verify."""

    contents: Contents
    faults: list[str] | None
    difference: Difference | None


def read_contents(path: Place) -> Contents:
    """Read the JSON of the checkpoint `path`; raises CheckpointError naming what is damaged."""
    mark = read_mark(path)
    return Contents(path, mark, read_manifest(path, mark), read_documents(path))


def inspect(asked: InspectConfig) -> Inspection:
    """Look at a checkpoint as asked; raises CheckpointError where it cannot even be read."""
    other = checkpoint_at(place_of(asked.against)) if asked.against is not None else None
    faults = None
    if asked.verify:
        paths = [asked.path] if other is None else [asked.path, other]
        faults = [f"{path}: {fault}" for path in paths for fault in verify(path)]
    try:
        one = read_contents(asked.path)
        two = read_contents(other) if other is not None else None
    except CheckpointError as error:
        raise CheckpointError(f"{asked.path} cannot be read", faults or error.problems) from error
    compared = None
    if two is not None and not faults:
        compared = difference(one.path, one.manifest, one.config, two.path, two.manifest, two.config)
    return Inspection(one, faults, compared)


def num_bytes(tensor: StoredTensor) -> int:
    """The size of a whole tensor."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def totals(manifest: Manifest) -> dict[str, Total]:
    """Sizes by kind (`model`, `optimizer`, `average`; what other programs saved under its own first word)."""
    sums: dict[str, Total] = {}
    for name, tensor in manifest.tensors.items():
        kind = name.partition(".")[0]
        so_far, size, expert = sums.get(kind, Total(0, 0, 0, 0)), num_bytes(tensor), ".experts." in name
        sums[kind] = Total(
            so_far.tensors + 1,
            so_far.elements + math.prod(tensor.shape),
            so_far.expert_bytes + size * expert,
            so_far.other_bytes + size * (not expert),
        )
    return {kind: sums[kind] for kind in sorted(sums, key=lambda k: KINDS.index(k) if k in KINDS else len(KINDS))}


def held_by_files(manifest: Manifest) -> dict[str, Held]:
    """What each file holds."""
    numbers: dict[str, set[int]] = {file: set() for file in manifest.files}
    counts = dict.fromkeys(manifest.files, 0)
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            counts[chunk.file] += 1
            if chunk.experts is not None:
                numbers[chunk.file].update(range(*chunk.experts))
    return {file: Held(manifest.files[file], counts[file], _runs(numbers[file])) for file in sorted(manifest.files)}


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def as_document(inspection: Inspection) -> dict[str, object]:
    """All of it as plain values, for programs."""
    contents, faults, compared = inspection
    return {
        "path": str(contents.path),
        "step": contents.mark.step,
        "saved_by": contents.mark.world,
        **contents.documents,
        "totals": {kind: total._asdict() for kind, total in totals(contents.manifest).items()},
        "files": {file: held._asdict() for file, held in held_by_files(contents.manifest).items()},
        "tensors": {name: _tensor_document(tensor) for name, tensor in contents.manifest.tensors.items()},
        "faults": faults,
        "difference": None if compared is None else compared.as_document(),
    }


def _tensor_document(tensor: StoredTensor) -> dict[str, object]:
    places = [(chunk.file, chunk.experts) for chunk in tensor.chunks]
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "bytes": num_bytes(tensor),
        "files": [file for file, _ in places],
        "experts": {file: experts for file, experts in places if experts is not None} or None,
    }
