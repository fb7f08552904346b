"""This file owns the difference of two checkpoints: settings, names, and values tensor by tensor, in bounded memory."""

import math
from typing import NamedTuple

import torch

from softmoe_train.checkpoint.agreement import DamagedError
from softmoe_train.checkpoint.blocks import Files, blocks, opened
from softmoe_train.checkpoint.manifest import JSON, Manifest, StoredTensor
from softmoe_train.checkpoint.reader import file_faults
from softmoe_train.checkpoint.remote import Place
from softmoe_train.config import flat


class Changed(NamedTuple):
    """How far one tensor differs: |a - b| / |a| in the 2-norm, and the largest difference of an element."""

    relative: float
    largest: float


class Difference(NamedTuple):
    """What differs between two checkpoints; every name is in exactly one of these."""

    other: Place
    settings: dict[str, tuple[JSON, JSON]]  # by key, here and there; None where it is not
    only_here: list[str]
    only_there: list[str]
    reshaped: dict[str, tuple[str, str]]
    changed: dict[str, Changed]
    equal: list[str]

    def as_document(self) -> dict[str, object]:
        """As plain values; a number that is not finite is null."""
        changed = {
            name: {key: value if math.isfinite(value) else None for key, value in change._asdict().items()}
            for name, change in self.changed.items()
        }
        return {**self._asdict(), "other": str(self.other), "changed": changed}


def difference(
    path: Place,
    manifest: Manifest,
    config: dict[str, JSON],
    other_path: Place,
    other: Manifest,
    other_config: dict[str, JSON],
) -> Difference:
    """Compare two checkpoints, however each was cut; raises DamagedError where a file is not as large as it should be."""
    for at, held in ((path, manifest), (other_path, other)):
        faults = file_faults(at, held, held.files)
        if faults:
            raise DamagedError(f"{at} is damaged", list(faults.values()))
    here, there = flat(config), flat(other_config)
    keys = (key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key))
    common = [name for name in manifest.tensors if name in other.tensors]
    shapes = {name: (_shape(manifest.tensors[name]), _shape(other.tensors[name])) for name in common}
    changed = {}
    with opened(path) as files, opened(other_path) as other_files:
        for name in common:
            if manifest.tensors[name].shape == other.tensors[name].shape:
                changed[name] = _changed(files, manifest.tensors[name], other_files, other.tensors[name])
    equal = [name for name, change in changed.items() if change == Changed(0.0, 0.0)]
    return Difference(
        other=other_path,
        settings={key: (here.get(key), there.get(key)) for key in keys},
        only_here=[name for name in manifest.tensors if name not in other.tensors],
        only_there=[name for name in other.tensors if name not in manifest.tensors],
        reshaped={name: pair for name, pair in shapes.items() if name not in changed},
        changed={name: change for name, change in changed.items() if name not in set(equal)},
        equal=equal,
    )


def _shape(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {tensor.shape}"


def _changed(files: Files, tensor: StoredTensor, other_files: Files, other: StoredTensor) -> Changed:
    squares, norm, largest = 0.0, 0.0, 0.0
    pairs = zip(blocks(files, tensor, torch.float64), blocks(other_files, other, torch.float64), strict=True)
    for a, b in pairs:
        norm += a.square().sum().item()
        if torch.equal(a, b):
            continue
        apart = (a - b).abs()
        squares += apart.square().sum().item()
        most = apart.max().item()
        largest = math.nan if math.isnan(most) or math.isnan(largest) else max(largest, most)
    if squares == 0:
        return Changed(0.0, largest)
    return Changed(math.sqrt(squares / norm) if norm else math.inf, largest)
