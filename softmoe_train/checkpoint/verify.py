"""This file owns the full check of a checkpoint folder, for whoever asks whether it can be trusted."""

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.manifest import (
    MANIFEST,
    MARK,
    Manifest,
    Mark,
    read_hashed,
    read_manifest,
    read_mark,
)
from softmoe_train.checkpoint.reader import file_faults
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.shards import chunk_fault, header_entry, read_header


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
    for file in sorted(manifest.files.keys() - broken.keys()):
        problems += _shard_faults(path, manifest, file)
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


def _shard_faults(path: Place, manifest: Manifest, file: str) -> list[str]:
    held = [
        (name, tensor, chunk)
        for name, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == file
    ]
    with (path / file).open("rb") as handle:
        faults = [chunk_fault(handle, name, tensor, chunk) for name, tensor, chunk in held]
    try:
        header = read_header(path / file)
    except ValueError as error:
        return [*(fault for fault in faults if fault), f"{file} is no safetensors file: {error}"]
    header.pop("__metadata__", None)
    data_start = min(chunk.start for _, _, chunk in held)
    expected = {name: header_entry(tensor, chunk, data_start) for name, tensor, chunk in held}
    if header != expected:
        names = sorted(name for name in {*header, *expected} if header.get(name) != expected.get(name))
        faults.append(f"{file}: its header and {MANIFEST} differ in {', '.join(names)}")
    return [fault for fault in faults if fault]
