"""This file owns where weights may come from: our checkpoints, our exports, timm's safetensors, big_vision's npz."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.blocks import Files, opened, whole_reads
from softmoe_train.checkpoint.folder import checkpoint_at
from softmoe_train.checkpoint.inspect import Contents, found, read_contents
from softmoe_train.checkpoint.layout import Box, overlap, within
from softmoe_train.checkpoint.manifest import StoredTensor
from softmoe_train.checkpoint.reader import check_hashes, file_faults
from softmoe_train.checkpoint.remote import place_of
from softmoe_train.checkpoint.shards import read_part
from softmoe_train.redact import without_secrets
from softmoe_train.warm.lazy import Lazy, window
from softmoe_train.warm.npz import read_npz
from softmoe_train.warm.settings import NPZ, SAFETENSORS, WarmConfig
from softmoe_train.warm.translate import Translated, from_big_vision, from_timm


class Source(NamedTuple):
    """Weights that can be taken over, and what is known of the model that they are from."""

    what: str  # in words
    weights: Translated
    model: Mapping[str, Any] | None  # its settings, where it is ours
    # Of rank and world: this rank's share of the bytes that can be checked is what was saved.
    verify: Callable[[int, int], None]


@contextmanager
def opened_source(config: WarmConfig) -> Iterator[Source]:
    """The source that the settings name; only headers are read until its tensors are. Raises CheckpointError with every reason why not."""
    assert config.source is not None
    name = without_secrets(config.source)
    suffix = Path(config.source).suffix.lower()
    if "://" in config.source or Path(config.source).is_dir():
        yield from _of_checkpoint(config)
        return
    problem = None
    if not Path(config.source).is_file():
        problem = "there is no such file or folder"
    elif config.weights != "model":
        problem = (
            f"warm.weights={config.weights} is for checkpoints, and this file holds one kind; use warm.weights=model"
        )
    elif suffix not in (NPZ, SAFETENSORS):
        problem = f"neither a run folder, nor a {SAFETENSORS} or {NPZ} file"
    if problem is not None:
        raise CheckpointError(f"warm.source={name}", [problem])
    yield from (_of_npz if suffix == NPZ else _of_safetensors)(Path(config.source))


def _of_checkpoint(config: WarmConfig) -> Iterator[Source]:
    source = str(config.source)
    try:
        found("warm.source", source)
    except ValueError as error:
        raise CheckpointError(f"warm.source={without_secrets(source)}", [str(error)]) from error
    contents = read_contents(checkpoint_at(place_of(source)))
    stored = contents.manifest.tensors
    kind = f"{config.weights}."
    taken = {name.removeprefix(kind): tensor for name, tensor in stored.items() if name.startswith(kind)}
    taken.pop("updates", None)  # a count, of the average
    model = contents.config.get("model")
    if not taken or not isinstance(model, dict):
        remedy = "use warm.weights=model" if config.weights == "average" and model else "it was not saved by a run"
        raise CheckpointError(
            f"warm.source={without_secrets(source)}", [f"it has no {config.weights} weights: {remedy}"]
        )
    faults = file_faults(contents.path, contents.manifest, {c.file for tensor in taken.values() for c in tensor.chunks})
    if faults:
        raise CheckpointError(f"warm.source={without_secrets(source)} is damaged", list(faults.values()))
    rule = f"only {config.weights} weights are taken over, all else starts anew"
    aside = dict.fromkeys(stored.keys() - {f"{kind}{name}" for name in taken}, rule)
    with opened(contents.path) as files:
        tensors = {name: _stored(f"{kind}{name}", tensor, files) for name, tensor in taken.items()}
        yield Source(
            f"{contents.path}, the {config.weights} weights of step {contents.mark.step}",
            Translated(tensors, aside, {}, [], _heads(model)),
            model,
            lambda rank, world: _check_share(contents, [t.origin[0] for t in tensors.values()], rank, world),
        )


def _heads(model: Mapping[str, Any]) -> int | None:
    heads = model.get("num_heads")
    return heads if isinstance(heads, int) else None


def _stored(name: str, tensor: StoredTensor, files: Files) -> Lazy:
    def read(box: Box) -> torch.Tensor:
        values = torch.empty(box.sizes, dtype=torch.float32)
        for chunk in tensor.chunks:
            part = overlap(box, chunk.box)
            if part is not None:
                read_part(files.open(chunk.file), tensor, chunk, part, values[within(part, box)])
        return values

    return Lazy(tensor.shape, read, (name,))


def _check_share(contents: Contents, names: list[str], rank: int, world: int) -> None:
    """Compare the hashes of every `world`-th chunk: together the ranks read each byte once more than they need."""
    check_hashes(contents.path, contents.manifest, whole_reads(contents.manifest, names)[rank::world])


def _of_safetensors(path: Path) -> Iterator[Source]:
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"warm.source={path} cannot be read", [f"{type(error).__name__}: {error}"]) from error
    with file:
        stored = {name: _sliced(name, file) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        about = file.metadata() or {}
        if "softmoe_format" in about:
            yield _exported(path, stored, about)
        else:
            if "patch_embed.proj.weight" not in stored:
                some = ", ".join(sorted(stored)[:3])
                rule = "neither an export of ours nor in timm's names, which have patch_embed.proj.weight"
                raise CheckpointError(f"warm.source={path}", [f"it is {rule}; it has {some} ..."])
            yield Source(f"{path}, in timm's names", from_timm(stored), None, lambda rank, world: None)


def _sliced(name: str, file: Any) -> Lazy:
    values = file.get_slice(name)
    shape = tuple(values.get_shape())
    return Lazy(shape, lambda box: (values[window(box)] if shape else file.get_tensor(name)).float(), (name,))


def _exported(path: Path, stored: dict[str, Lazy], about: Mapping[str, str]) -> Source:
    if about.get("experts") == "separate":
        rule = "its experts are in files of their own; export it with experts=together"
        raise CheckpointError(f"warm.source={path}", [rule])
    try:
        model = json.loads(about["model"])
        translated = Translated(stored, {}, {}, [], _heads(model))
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"warm.source={path}", [f"its metadata does not tell its model: {error!r}"]) from error
    what = f"{path}, the {about.get('weights')} weights of step {about.get('step')}"
    return Source(what, translated, model, lambda rank, world: None)


def _of_npz(path: Path) -> Iterator[Source]:
    try:
        stored = read_npz(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"warm.source={path} cannot be read", [f"{type(error).__name__}: {error}"]) from error
    yield Source(f"{path}, in big_vision's names", from_big_vision(stored), None, lambda rank, world: None)
