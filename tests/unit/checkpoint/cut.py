"""This file owns a checkpoint as several ranks would have cut it, written by one process."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmoe_train.checkpoint.layout import Box
from softmoe_train.checkpoint.manifest import Manifest, StoredTensor, mark_of
from softmoe_train.checkpoint.shards import Part, shard_layout, write_shard


def save_cut(folder: Path, step: int, tensors: dict[str, Tensor], documents: dict[str, Any], files: int) -> Path:
    """The checkpoint of `step` in `files` files, each tensor cut along its first dim that divides, or whole in the first."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    held: list[dict[Part, Tensor]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        dim = next((d for d in range(tensor.ndim) if tensor.shape[d] % files == 0 and tensor.numel()), None)
        pieces = [tensor] if dim is None else tensor.chunk(files, dim)
        for i, piece in enumerate(pieces):
            offsets = tuple(i * piece.shape[d] if d == dim else 0 for d in range(tensor.ndim))
            box = Box(offsets, tuple(piece.shape))
            held[i][Part(name, box, tensor.dtype)] = piece
    chunks: dict[str, list[Any]] = {name: [] for name in tensors}
    sizes = {}
    for i, pieces in enumerate(held):
        if pieces:
            file, shard = path / f"rank_{i:05d}.safetensors", shard_layout(list(pieces))
            data = torch.cat([pieces[part].contiguous().view(-1).view(torch.uint8) for part in shard.parts])
            for part, chunk in zip(shard.parts, write_shard(file, shard, data)[0], strict=True):
                chunks[part.name].append(chunk)
            sizes[file.name] = file.stat().st_size
    stored = {
        name: StoredTensor(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."), chunks=tuple(chunks[name]))
        for name, t in tensors.items()
    }
    texts = {name: json.dumps(document).encode() for name, document in documents.items()}
    manifest = Manifest(version=2, files=sizes, tensors=stored).model_dump_json().encode()
    for name, text in {**texts, "manifest": manifest}.items():
        (path / f"{name}.json").write_bytes(text)
    (path / "COMPLETE.json").write_text(mark_of(step, files, manifest, texts).model_dump_json(indent=1))
    return path


def values() -> dict[str, Tensor]:
    """Tensors of every kind, each element its own value."""
    return {
        "model.blocks.1.moe.experts.w1": torch.arange(8 * 6 * 5).view(8, 6, 5).float() / 7,
        "model.odd": torch.arange(7 * 4).view(7, 4).float() / 3,  # cut along dim 1
        "model.lone": torch.arange(5).float() / 9,  # in one piece
        "optimizer.exp_avg.blocks.1.moe.experts.w1": torch.arange(8 * 6 * 5).view(8, 6, 5).float().neg(),
        "optimizer.updates": torch.tensor([7.0]),
        "average.odd": torch.arange(7 * 4).view(7, 4).float(),
        "loop.seen": torch.tensor(2**40),
        "loop.none": torch.zeros(0, 4),
    }


CONFIG = {"seed": 3, "model": {"width": 32}}
LOOP = {"step": 20, "images_seen": 320, "cursor": {"position": 320}, "best": None}
