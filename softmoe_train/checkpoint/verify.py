"""This file owns the full check of a checkpoint folder, for whoever asks whether it can be trusted."""

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.manifest import (
    MANIFEST,
    MARK,
    Mark,
    Stored,
    held_in,
    read_hashed,
    read_manifest,
    read_mark,
)
from softmoe_train.checkpoint.reader import file_faults
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.shards import chunk_fault, header_fault


def verify(path: Place) -> list[str]:
    """Every problem of the checkpoint `path` by name, or an empty list: documents, coverage, files, headers, hashes."""
    try:
        mark = read_mark(path)
    except CheckpointError as error:
        return error.problems
    problems = _document_faults(path, mark)
    try:
        manifest = read_manifest(path, mark)
    except CheckpointError as error:
        return problems + error.problems
    broken = file_faults(path, manifest, manifest.files)
    problems += broken.values()
    for file, held in held_in(manifest, sorted(manifest.files.keys() - broken.keys())).items():
        problems += _shard_faults(path, file, held)
    known = {MARK, MANIFEST, *manifest.files, *(f"{name}.json" for name in mark.documents)}
    return problems + [f"{p.name} does not belong here" for p in sorted(path.iterdir()) if p.name not in known]


def _document_faults(path: Place, mark: Mark) -> list[str]:
    faults = []
    for name, sha256 in mark.documents.items():
        try:
            read_hashed(path / f"{name}.json", sha256)
        except CheckpointError as error:
            faults += error.problems
    return faults


def _shard_faults(path: Place, file: str, held: list[Stored]) -> list[str]:
    with (path / file).open("rb") as handle:
        faults = [chunk_fault(handle, *stored) for stored in held]
        faults.append(header_fault(handle, file, held))
    return [fault for fault in faults if fault]
