"""This file owns what a checkpoint says about itself: manifest, completion mark, and the rules both must pass."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, ValidationError, model_validator

from softmoe_train.checkpoint.agreement import CheckpointError, DamagedError
from softmoe_train.checkpoint.layout import Box, tiling_fault
from softmoe_train.checkpoint.remote import Place
from softmoe_train.config import Record

MARK = "COMPLETE.json"
MANIFEST = "manifest.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
DOCUMENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

JSON = dict[str, "JSON"] | list["JSON"] | str | int | float | bool | None
Documents = Mapping[str, JSON]  # by name, each a file beside the tensors
Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # of XXH3: 15 times as fast, for bytes that nobody forges
# A plain base name: nothing that leaves the folder can be written in it.
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors$")]
DocumentName = Annotated[str, Field(pattern=rf"^{DOCUMENT_NAME.pattern}$")]
R = TypeVar("R", bound=Record)


class StoredChunk(Record):
    """One box of a tensor: where it lies in the tensor, in which file from which byte, and the hash of its bytes."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    file: ShardName
    start: Count
    xxh128: Xxh128
    experts: tuple[Count, Count] | None  # first expert and one past the last

    @property
    def box(self) -> Box:
        """The part of the global tensor that this chunk holds."""
        return Box(self.offsets, self.sizes)


class StoredTensor(Record):
    """A tensor's global shape, its dtype and the chunks that tile it."""

    shape: tuple[Count, ...]
    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    chunks: tuple[StoredChunk, ...]

    def num_bytes(self, chunk: StoredChunk) -> int:
        """The size of a chunk of this tensor, in bytes."""
        return math.prod(chunk.sizes) * DTYPES[self.dtype].itemsize


Stored = tuple[str, StoredTensor, StoredChunk]  # a chunk with its tensor and that tensor's name


class Manifest(Record):
    """Every tensor of a checkpoint and every file (with its size in bytes); a valid one leaves no element uncovered."""

    version: Literal[2]
    files: dict[ShardName, Count]
    tensors: dict[str, StoredTensor]

    @model_validator(mode="after")
    def _is_sound(self) -> "Manifest":
        faults = []
        spans: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.files}
        for name, tensor in self.tensors.items():
            fault = tiling_fault(tensor.shape, [chunk.box for chunk in tensor.chunks])
            faults += [f"{name}: {fault}"] if fault else []
            for chunk in tensor.chunks:
                if chunk.experts != experts_of(name, chunk.box):
                    faults.append(f"{name}: chunk at {chunk.offsets} claims experts {chunk.experts}")
                if chunk.file not in spans:
                    faults.append(f"{name}: {chunk.file} is not among the files")
                else:
                    spans[chunk.file].append((chunk.start, chunk.start + tensor.num_bytes(chunk), name))
        for file, held in spans.items():
            faults += _span_faults(file, self.files[file], sorted(held))
        if faults:
            raise ValueError("; ".join(faults))
        return self


class Mark(Record):
    """The completion mark: the step, the number of ranks that wrote, the hash of every JSON file beside it, and its own."""

    version: Literal[2]
    step: Count
    world: Annotated[int, Field(ge=1)]
    manifest: Sha256
    documents: dict[DocumentName, Sha256]
    own: Sha256  # of all the above: nothing else speaks for the mark

    @model_validator(mode="after")
    def _is_its_own(self) -> "Mark":
        if self.own != _own_hash(self.model_dump(exclude={"own"})):
            raise ValueError("it is not what was written: it was changed")
        return self


def mark_of(step: int, world: int, manifest: bytes, documents: Mapping[str, bytes]) -> Mark:
    """The mark of a step that `world` ranks saved, whose JSON files have these bytes."""
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in documents.items()}
    said = {"version": 2, "step": step, "world": world, "manifest": hashlib.sha256(manifest).hexdigest()}
    said |= {"documents": hashes}
    return Mark.model_validate({**said, "own": _own_hash(said)})


def _own_hash(said: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def experts_of(name: str, box: Box) -> tuple[int, int] | None:
    """The experts (first, one past the last) in a box of an expert tensor, or None for any other tensor."""
    if ".experts." not in name or not box.sizes:
        return None
    return box.offsets[0], box.offsets[0] + box.sizes[0]


def described(name: str, chunk: StoredChunk) -> str:
    """A chunk in words: `experts 4..7 of model.blocks.2.moe.experts.w1`, or just the tensor's name."""
    return name if chunk.experts is None else f"experts {chunk.experts[0]}..{chunk.experts[1] - 1} of {name}"


def held_in(manifest: Manifest, files: Collection[str]) -> dict[str, list[Stored]]:
    """What each of `files` holds, tensor by tensor."""
    held: dict[str, list[Stored]] = {file: [] for file in files}
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file in held:
                held[chunk.file].append((name, tensor, chunk))
    return held


def to_json(value: JSON, name: str) -> bytes:
    """The bytes of `value` as strict JSON (no NaN, no infinity); raises CheckpointError naming the document."""
    try:
        return json.dumps(value, allow_nan=False, indent=1).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError("not JSON", [f"document {name}: {error}"]) from error


def read_mark(path: Place) -> Mark:
    """The completion mark of the folder `path`; raises CheckpointError where there is none or it is not sound."""
    if not (path / MARK).is_file():
        raise CheckpointError(f"{path} is no checkpoint", [f"{MARK} is missing: the save never finished"])
    return _parse(Mark, MARK, (path / MARK).read_bytes())


def read_manifest(path: Place, mark: Mark) -> Manifest:
    """The manifest of the folder `path`, checked against the mark and its own rules; raises DamagedError."""
    return _parse(Manifest, MANIFEST, read_hashed(path / MANIFEST, mark.manifest))


def read_hashed(path: Place, sha256: str) -> bytes:
    """The bytes of a JSON file, which must have the hash that the mark holds; raises DamagedError naming it."""
    if not path.is_file():
        raise DamagedError(f"{path.parent} is damaged", [f"{path.name} is missing"])
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{path.parent} is damaged", [f"{path.name} is not what {MARK} says: it was changed"])
    return data


def _parse(kind: type[R], name: str, data: bytes) -> R:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [": ".join([name, *filter(None, [".".join(map(str, e["loc"]))]), e["msg"]]) for e in faults]
        kinds = {(e["loc"], e["type"]) for e in faults}
        if (("version",), "literal_error") in kinds:  # of a newer program perhaps, and whole
            raise CheckpointError(f"{name} is of another version", lines) from error
        raise DamagedError(f"{name} is not sound", lines) from error


def _span_faults(file: str, size: int, spans: list[tuple[int, int, str]]) -> list[str]:
    faults = [] if spans else [f"{file} holds no chunk"]
    end = 8  # a safetensors file opens with the length of its header
    for start, stop, name in spans:
        if start < end:
            faults.append(f"{name}: its bytes in {file} from {start} are not its own")
        end = max(end, stop)
    return faults + ([f"{file} has {size} bytes but its chunks need {end}"] if end > size else [])
